"""What a user can get wrong, and the sentence that must say so: expressions of Python, and command lines.

The names in the expressions are those of ``test_wrong_inputs.py``.
"""

CONSTRUCT = [
    ("features.HashedNgrams(())", "HashedNgrams: bins must be at least one number, got none."),
    ('features.HashedNgrams("64")', "HashedNgrams: bins must be a list of whole numbers, got '64'."),
    ("features.HashedNgrams((64,), padding=-1)", "HashedNgrams: padding must be a whole number of at least 0, got -1."),
    (
        "features.HashedNgrams((64,), padding='x')",
        "HashedNgrams: padding must be a whole number of at least 0, got 'x'.",
    ),
    ("features.Custom(3)", "Custom: function must be callable on the network's input, got int."),
    ("features.PatchBank(8, size=1)", "PatchBank: size must be a whole number of at least 2, got 1."),
    ("features.PatchBank(8, size=1.5)", "PatchBank: size must be a whole number of at least 2, got 1.5."),
    ('Noise(scale="x")', "Noise: scale must be a finite number of at least 0, got 'x'."),
    ("Noise(scale=None)", "Noise: scale must be a finite number of at least 0, got None."),
    ("Noise(scale=-1)", "Noise: scale must be a finite number of at least 0, got -1."),
    ('Noise(scale=float("nan"))', "Noise: scale must be a finite number of at least 0, got nan."),
    ('Noise(scale=float("inf"))', "Noise: scale must be a finite number of at least 0, got inf."),
    ("Noise(scale=[1.0])", "Noise: scale must be a finite number of at least 0, got a list."),
    ("Noise(scale=True)", "Noise: scale must be a finite number of at least 0, got True."),
    ('Rotation(degrees="90")', "Rotation: degrees must be a finite number, got '90'."),
    ("Rotation(degrees=None)", "Rotation: degrees must be a finite number, got None."),
    ('Rotation(degrees=float("inf"))', "Rotation: degrees must be a finite number, got inf."),
    ("Rotation(degrees=True)", "Rotation: degrees must be a finite number, got True."),
    ("Translation(length=-1)", "Translation: length must be a finite number of at least 0, got -1."),
    ('Translation(length="far")', "Translation: length must be a finite number of at least 0, got 'far'."),
    ('Shear(factor=float("nan"))', "Shear: factor must be a finite number, got nan."),
    ("Shear(factor=None)", "Shear: factor must be a finite number, got None."),
    ("Scaling(factor=0.5)", "Scaling: factor must be a finite number of at least 1, got 0.5."),
    ('Scaling(factor="2")', "Scaling: factor must be a finite number of at least 1, got '2'."),
    ("Compose([])", "Compose: perturbations must be at least one, got none."),
    ("Compose(None)", "Compose: perturbations must be a list of perturbations, got None."),
    ("Compose(Noise())", "Compose: perturbations must be a list of perturbations, got a Noise."),
    (
        'Compose([Noise(), "noise"])',
        "Compose: perturbations must be callable, got 'noise' of type str; a config needs _convert_:",
    ),
    (
        "Compose([Noise(), None])",
        "Compose: perturbations must be callable, got None of type NoneType; a config needs _convert_:",
    ),
    (
        "Compose([Noise])",
        "Compose: perturbation must be callable, such as Noise(scale=1.0), got the class Noise; call it.",
    ),
    ("Mixture([])", "Mixture: perturbations must be at least one, got none."),
    ("Mixture(Noise())", "Mixture: perturbations must be a list of perturbations, got a Noise."),
    (
        "Mixture([Noise(), Ablate()], weights=[1])",
        "Mixture: weights must be 2 numbers of at least 0, one for each perturbation and not all 0, got",
    ),
    (
        "Mixture([Noise(), Ablate()], weights=[0, 0])",
        "Mixture: weights must be 2 numbers of at least 0, one for each perturbation and not all 0, got",
    ),
    (
        'Mixture([Noise(), Ablate()], weights=["a", "b"])',
        "Mixture: weights must be 2 numbers of at least 0, one for each perturbation and not all 0, got",
    ),
    ("Mixture([Noise(), Ablate()], weights=0.5)", "Mixture: weights must be a list of numbers, got 0.5."),
    (
        "Mixture([Noise(), Ablate()], weights=[-1, 2])",
        "Mixture: weights must be 2 numbers of at least 0, one for each perturbation and not all 0, got",
    ),
    (
        'Mixture([Noise(), Ablate()], weights=[float("nan"), 1])',
        "Mixture: weights must be 2 numbers of at least 0, one for each perturbation and not all 0, got",
    ),
    (
        'Affine(matrix="A")',
        "Affine: matrix must be a square matrix of finite numbers, or a callable (inputs, generator) ->",
    ),
    (
        "Affine(matrix=[[1, 0], [0]])",
        "Affine: matrix must be a square matrix of finite numbers, or a callable (inputs, generator) ->",
    ),
    (
        'Affine(shift="t")',
        "Affine: shift must be a vector of finite numbers, or a callable (inputs, generator) -> Tensor;",
    ),
    (
        'Affine(shift=[["x"]])',
        "Affine: shift must be a vector of finite numbers, or a callable (inputs, generator) -> Tensor;",
    ),
    (
        "Affine(shift=3)",
        "Affine: shift must be a vector of finite numbers, or a callable (inputs, generator) -> Tensor;",
    ),
    (
        "Affine(matrix=torch.eye(3)[0])",
        "Affine: matrix must be a square matrix of finite numbers, or a callable (inputs, generator) ->",
    ),
    ("InSubspace(Noise(), None)", "InSubspace: basis must be a floating-point tensor (inputs, dimensions), such as"),
    (
        'InSubspace("noise", torch.eye(3))',
        "InSubspace: perturbation must be callable, such as Noise(scale=1.0), got 'noise'.",
    ),
    (
        "InSubspace(Noise(), torch.ones(3))",
        "InSubspace: basis must be a floating-point tensor (inputs, dimensions), such as",
    ),
    ("InSubspace(Noise(), [[1.0]])", "InSubspace: basis must be a floating-point tensor (inputs, dimensions), such as"),
    (
        "InSubspace(Noise(), torch.eye(3, dtype=torch.long))",
        "InSubspace: basis must be a floating-point tensor (inputs, dimensions), such as",
    ),
    (
        "RandomSubspace(dimensions=0)",
        "subspace: dimensions must be a share in (0, 1] such as 0.5, or a whole number of at least 1,",
    ),
    (
        "RandomSubspace(dimensions=1.5)",
        "subspace: dimensions must be a share in (0, 1] such as 0.5, or a whole number of at least 1,",
    ),
    (
        'RandomSubspace(dimensions="half")',
        "subspace: dimensions must be a share in (0, 1] such as 0.5, or a whole number of at least 1,",
    ),
    (
        "RandomSubspace(dimensions=None)",
        "subspace: dimensions must be a share in (0, 1] such as 0.5, or a whole number of at least 1,",
    ),
    (
        "RandomSubspace(dimensions=True)",
        "subspace: dimensions must be a share in (0, 1] such as 0.5, or a whole number of at least 1,",
    ),
    ('RandomSubspace(seed="x")', "subspace: seed must be a whole number of at least 0, got 'x'."),
    (
        "LearnedSubspace(dimensions=-1)",
        "subspace: dimensions must be a share in (0, 1] such as 0.5, or a whole number of at least 1,",
    ),
    ("LearnedSubspace(steps=0)", "subspace: steps must be a whole number of at least 1, got 0."),
    ("LearnedSubspace(steps=2.5)", "subspace: steps must be a whole number of at least 1, got 2.5."),
    ("LearnedSubspace(seed=None)", "subspace: seed must be a whole number of at least 0, got None."),
    ('GivenSubspace("no such file.pt")', "subspace: there is no file no such file.pt; give one that torch.save wrote."),
    ("GivenSubspace(None)", "subspace: bases must map each layer to a matrix (inputs, dimensions), for instance"),
    (
        "GivenSubspace([torch.eye(3)])",
        "subspace: bases must map each layer to a matrix (inputs, dimensions), for instance",
    ),
    (
        'GivenSubspace({"fc": torch.ones(3)})',
        "subspace: bases must map each layer to a matrix (inputs, dimensions), for instance",
    ),
    (
        'GivenSubspace({"fc": [[1.0]]})',
        "subspace: bases must map each layer to a matrix (inputs, dimensions), for instance",
    ),
    ('GivenSubspace({"fc": torch.zeros(3, 1)})', "subspace: the basis of 'fc' spans no direction, or is not finite."),
    (
        'GivenSubspace({"fc": torch.full((3, 1), float("nan"))})',
        "subspace: the basis of 'fc' spans no direction, or is not finite.",
    ),
    (
        'GivenSubspace({"fc": torch.zeros(3, 0)})',
        "subspace: the basis of 'fc' spans no direction, or is not finite.",
    ),
    (
        'GivenSubspace({"fc": torch.eye(3, dtype=torch.complex64)})',
        "subspace: bases must map each layer to a matrix (inputs, dimensions), for instance",
    ),
    ('PartitionCallback(after="0.6")', "partition: after must be a share in [0, 1], got '0.6'."),
    ("PartitionCallback(after=1.5)", "partition: after must be a share in [0, 1], got 1.5."),
    ("PartitionCallback(after=None)", "partition: after must be a share in [0, 1], got None."),
    ("PartitionCallback(after=True)", "partition: after must be a share in [0, 1], got True."),
    ('PartitionCallback(after=float("nan"))', "partition: after must be a share in [0, 1], got nan."),
    ("PartitionCallback(every_n_steps=0)", "partition: every_n_steps must be a whole number of at least 1, got 0."),
    ("PartitionCallback(every_n_steps=2.5)", "partition: every_n_steps must be a whole number of at least 1, got 2.5."),
    ('PartitionCallback(every_n_steps="3")', "partition: every_n_steps must be a whole number of at least 1, got '3'."),
    ("PartitionCallback(every_n_epochs=-1)", "partition: every_n_epochs must be a whole number of at least 1, got -1."),
    (
        "PartitionCallback(every_n_steps=1, every_n_epochs=1)",
        "partition: every_n_steps and every_n_epochs contradict each other; give one of them.",
    ),
    (
        "PartitionCallback(after=0.5, every_n_epochs=1)",
        "partition: after=0.5 and every_n_epochs=1 contradict each other; give one of them.",
    ),
    ('PartitionCallback(when_below="low")', "partition: when_below must be a finite number, got 'low'."),
    ('PartitionCallback(when_below=float("nan"))', "partition: when_below must be a finite number, got nan."),
    ("PartitionCallback(when_below=True)", "partition: when_below must be a finite number, got True."),
    ("PartitionCallback(when_below=0.1, monitor=3)", "partition: monitor must be a text that is not blank, got 3."),
    ("PartitionCallback(monitor=None)", "partition: monitor must be a text that is not blank, got None."),
    ('PartitionCallback(monitor="")', "partition: monitor must be a text that is not blank, got ''."),
    ('PartitionCallback(isolation="none")', "partition: isolation must be one of exact, perturb, got 'none'."),
    ("PartitionCallback(isolation=None)", "partition: isolation must be one of exact, perturb, got None."),
    ("PartitionCallback(records=5)", "partition: records must be the path of a folder, got 5."),
    ('PartitionCallback(records="")', "partition: records must be the path of a folder, got ''."),
    ('PartitionCallback(similarity_matrix="yes")', "partition: similarity_matrix must be True or False, got 'yes'."),
    ('PartitionCallback(seed="x")', "partition: seed must be a whole number of at least 0, got 'x'."),
    ("PartitionCallback(seed=-1)", "partition: seed must be a whole number of at least 0, got -1."),
    ("PartitionCallback(seed=1.5)", "partition: seed must be a whole number of at least 0, got 1.5."),
    (
        "PartitionCallback(treshold=0.5)",
        "partition: there is no option 'treshold'; there are clusters, exclude, fold, layers,",
    ),
    ('PartitionCallback(measure="size")', "partition: measure must be one of weight, update, activation, got 'size'."),
    ("PartitionCallback(measure=None)", "partition: measure must be one of weight, update, activation, got None."),
    ("PartitionCallback(measure=3)", "partition: measure must be one of weight, update, activation, got 3."),
    ('PartitionCallback(threshold="high")', "partition: threshold must be a number in [-1, 1] or 'auto', got 'high'."),
    ("PartitionCallback(threshold=None)", "partition: threshold must be a number in [-1, 1] or 'auto', got None."),
    ("PartitionCallback(threshold=2)", "partition: threshold must be a number in [-1, 1] or 'auto', got 2."),
    ("PartitionCallback(threshold=True)", "partition: threshold must be a number in [-1, 1] or 'auto', got True."),
    ("PartitionCallback(threshold=[0.5])", "partition: threshold must be a number in [-1, 1] or 'auto', got [0.5]."),
    (
        "PartitionCallback(threshold=torch.ones(2))",
        "partition: threshold must be a number in [-1, 1] or 'auto', got tensor([1., 1.]).",
    ),
    ('PartitionCallback(tolerance="0.01")', "partition: tolerance must be a finite number of at least 0, got '0.01'."),
    ("PartitionCallback(tolerance=-0.1)", "partition: tolerance must be a finite number of at least 0, got -0.1."),
    ("PartitionCallback(tolerance=True)", "partition: tolerance must be a finite number of at least 0, got True."),
    ("PartitionCallback(min_claim=0)", "partition: min_claim must be a share in (0, 1], got 0."),
    ('PartitionCallback(min_claim="0.1")', "partition: min_claim must be a share in (0, 1], got '0.1'."),
    ("PartitionCallback(max_claim=2)", "partition: max_claim must be a share in (0, 1], got 2."),
    ("PartitionCallback(max_claim=0.01)", "partition: max_claim (0.01) must not be below min_claim (0.05)."),
    ("PartitionCallback(reserve_tasks=0)", "partition: reserve_tasks must be a whole number of at least 1, got 0."),
    (
        "PartitionCallback(reserve_tasks=None)",
        "partition: reserve_tasks must be a whole number of at least 1, got None.",
    ),
    ('PartitionCallback(clusters="kmeans")', "partition: clusters must be one of leader, components, got 'kmeans'."),
    (
        'PartitionCallback(representative="largest")',
        "partition: representative must be one of magnitude, random, got 'largest'.",
    ),
    ('PartitionCallback(fold="yes")', "partition: fold must be True or False, got 'yes'."),
    ("PartitionCallback(fold=None)", "partition: fold must be True or False, got None."),
    ("PartitionCallback(reinitialise=1)", "partition: reinitialise must be True or False, got 1."),
    ('PartitionCallback(layers="fc")', "partition: layers must be a list of layer names, got the string 'fc'."),
    ("PartitionCallback(layers=3)", "partition: layers must be a list of layer names, got 3."),
    ("PartitionCallback(layers=[1])", "partition: layers must be a list of layer names, such as 'network.1', got 1."),
    ('PartitionCallback(exclude="fc")', "partition: exclude must be a list of layer names, got the string 'fc'."),
    ("PartitionCallback(exclude=5)", "partition: exclude must be a list of layer names, got 5."),
    (
        "PartitionCallback(exclude=[nn.Linear(2, 2)])",
        "partition: exclude must be a list of layer names, such as 'network.1', got",
    ),
    (
        'PartitionCallback(after=0, measure="update")',
        "partition: measure='update' compares with the weights before the task was learned, which",
    ),
    (
        'InvarianceCallback(perturbation="noise")',
        "invariance: perturbation must be callable, such as Noise(scale=1.0), got 'noise'.",
    ),
    (
        "InvarianceCallback(perturbation=3)",
        "invariance: perturbation must be callable, such as Noise(scale=1.0), got 3.",
    ),
    (
        "InvarianceCallback(perturbation=Noise)",
        "invariance: perturbation must be callable, such as Noise(scale=1.0), got the class Noise; call",
    ),
    (
        "InvarianceCallback(perturbation=[Noise()])",
        "invariance: perturbation must be callable, such as Noise(scale=1.0), got a list.",
    ),
    (
        'InvarianceCallback(subspace="random")',
        "invariance: subspace must be a sub-space, such as RandomSubspace(dimensions=0.5), got 'random'.",
    ),
    (
        "InvarianceCallback(subspace=0.5)",
        "invariance: subspace must be a sub-space, such as RandomSubspace(dimensions=0.5), got 0.5.",
    ),
    (
        "InvarianceCallback(subspace=RandomSubspace)",
        "invariance: subspace must be a sub-space, such as RandomSubspace(dimensions=0.5), got the",
    ),
    (
        "InvarianceCallback(subspace=torch.eye(3))",
        "invariance: subspace must be a sub-space, such as RandomSubspace(dimensions=0.5), got a Tensor.",
    ),
    ("InvarianceCallback(every_n_steps=0)", "invariance: every_n_steps must be a whole number of at least 1, got 0."),
    (
        'InvarianceCallback(every_n_batches="1")',
        "invariance: every_n_batches must be a whole number of at least 1, got '1'.",
    ),
    (
        "InvarianceCallback(every_n_epochs=1.0)",
        "invariance: every_n_epochs must be a whole number of at least 1, got 1.0.",
    ),
    (
        "InvarianceCallback(every_n_steps=1, every_n_epochs=1)",
        "invariance: every_n_steps=1 and every_n_epochs=1 contradict each other; give one of them.",
    ),
    ("InvarianceCallback(seed=None)", "invariance: seed must be a whole number of at least 0, got None."),
    (
        'MaskedGradientCallback(subspace="random")',
        "masking: subspace must be a sub-space, such as RandomSubspace(dimensions=0.5), got 'random'.",
    ),
    (
        "MaskedGradientCallback(subspace=LearnedSubspace)",
        "masking: subspace must be a sub-space, such as RandomSubspace(dimensions=0.5), got the class",
    ),
    ('MaskedGradientCallback(mask_outputs="yes")', "masking: mask_outputs must be True or False, got 'yes'."),
    ("MaskedGradientCallback(mask_outputs=None)", "masking: mask_outputs must be True or False, got None."),
    (
        'TaskInferenceCallback("best")',
        "task_inference: strategy must be one of auto, statistics, unchanged, all, plain, joint,",
    ),
    (
        "TaskInferenceCallback(None)",
        "task_inference: strategy must be one of auto, statistics, unchanged, all, plain, joint,",
    ),
    (
        "TaskInferenceCallback(3)",
        "task_inference: strategy must be one of auto, statistics, unchanged, all, plain, joint,",
    ),
    (
        'TaskInferenceCallback(["auto", "lda"])',
        "task_inference: each strategy must be one of plain, joint,",
    ),
    ("TaskInferenceCallback([])", "task_inference: strategy must be one or several, each once; got []."),
    (
        'TaskInferenceCallback(("lda", "lda"))',
        "task_inference: strategy must be one or several, each once; got ['lda', 'lda'].",
    ),
    ("TaskInferenceCallback(weight=0)", "task_inference: weight must be a finite number above 0, got 0."),
    ('TaskInferenceCallback(weight="3")', "task_inference: weight must be a finite number above 0, got '3'."),
    ('TaskInferenceCallback(weight=float("nan"))', "task_inference: weight must be a finite number above 0, got nan."),
    ('TaskInferenceCallback(weight=float("inf"))', "task_inference: weight must be a finite number above 0, got inf."),
    ("TaskInferenceCallback(lr=-1)", "task_inference: lr must be a finite number above 0, got -1."),
    ("TaskInferenceCallback(lr=None)", "task_inference: lr must be a finite number above 0, got None."),
    ('TaskInferenceCallback(lr=float("inf"))', "task_inference: lr must be a finite number above 0, got inf."),
    ('TaskInferenceCallback(seed="x")', "task_inference: seed must be a whole number of at least 0, got 'x'."),
    ("Classifier(None)", "Classifier: network must be a network that maps inputs to logits, got None."),
    ('Classifier("mlp")', "Classifier: network must be a network that maps inputs to logits, got 'mlp'."),
    (
        "Classifier(nn.Linear)",
        "Classifier: network must be a network that maps inputs to logits, got the class Linear; call",
    ),
    (
        "Classifier(nn.Linear(2, 2), optimizer=3)",
        "Classifier: optimizer must make an optimiser from parameters, such as",
    ),
    (
        "Classifier(nn.Linear(2, 2), optimizer=torch.optim.SGD(nn.Linear(2, 2).parameters()))",
        "Classifier: optimizer must make an optimiser from parameters, such as",
    ),
    ('Classifier(nn.Linear(2, 2), cosine="yes")', "Classifier: cosine must be True or False, got 'yes'."),
    ("MLP(shape=5, classes=2)", "MLP: shape must be a list of whole numbers, got 5."),
    ('MLP(shape=(4,), classes="2")', "MLP: classes must be a whole number of at least 1, got '2'."),
    ("MLP(shape=(4,), classes=0)", "MLP: classes must be a whole number of at least 1, got 0."),
    ("MLP(shape=(4,), classes=2, hidden=5)", "MLP: hidden must be a list of whole numbers, got 5."),
    ("MLP(shape=(4,), classes=2, hidden=[0])", "MLP: hidden must be a whole number of at least 1, got 0."),
    ('MLP(shape=(4,), classes=2, hidden=["5"])', "MLP: hidden must be a whole number of at least 1, got '5'."),
    ('MLP(shape=("a",), classes=2)', "MLP: shape must be a whole number of at least 1, got 'a'."),
    ("CNN(shape=(1, 8), classes=2)", "CNN: shape must be (channels, height, width), got [1, 8]."),
    ("CNN(shape=(8, 8), classes=2)", "CNN: shape must be (channels, height, width), got [8, 8]."),
    ("CNN(shape=(1, 8, 8), classes=2, channels=3)", "CNN: channels must be a list of whole numbers, got 3."),
    ("CNN(shape=(1, 8, 8), classes=2, hidden=[5])", "CNN: hidden must be a whole number of at least 1, got a list."),
    (
        "ResNet(shape=(1, 8, 8), classes=2, channels=[])",
        "ResNet: channels must name the width of one stage at least, got none.",
    ),
    ("ResNet(shape=(1, 8, 8), classes=None)", "ResNet: classes must be a whole number of at least 1, got None."),
    ("ResNet(shape=(1, 8, 8), classes=2, blocks=0)", "ResNet: blocks must be a whole number of at least 1, got 0."),
]
"""Constructors of callbacks, perturbations, sub-spaces and networks."""

TASK = [
    ("Task(None, data, classes=[0, 1])", "A task needs a name, got None."),
    ("Task(3, data, classes=[0, 1])", "A task needs a name, got 3."),
    ('Task("", data, classes=[0, 1])', "A task needs a name, got ''."),
    ('Task("   ", data, classes=[0, 1])', "A task needs a name, got ' '."),
    (
        'Task("a\\x1b[31mb", data, classes=[0, 1])',
        "Task: name must be one line without control characters, got 'a\\x1b[31mb'.",
    ),
    ('Task("a\\nb", data, classes=[0, 1])', "Task: name must be one line without control characters, got 'a\\nb'."),
    ('Task("a\\x00b", data, classes=[0, 1])', "Task: name must be one line without control characters, got 'a\\x00b'."),
    ("Task(data, [0, 1])", "A task needs a name, got a dict."),
    (
        'Task("a", None, classes=[0, 1])',
        "Task 'a': data must be a LightningDataModule or loaders by stage, with 'train' and perhaps",
    ),
    (
        'Task("a", 5, classes=[0, 1])',
        "Task 'a': data must be a LightningDataModule or loaders by stage, with 'train' and perhaps",
    ),
    (
        'Task("a", "data", classes=[0, 1])',
        "Task 'a': data must be a LightningDataModule or loaders by stage, with 'train' and perhaps",
    ),
    (
        'Task("a", dataset, classes=[0, 1])',
        "Task 'a': data must be a LightningDataModule or loaders by stage, with 'train' and perhaps",
    ),
    (
        'Task("a", loader, classes=[0, 1])',
        "Task 'a': data must be a LightningDataModule or loaders by stage, with 'train' and perhaps",
    ),
    (
        'Task("a", [loader, loader], classes=[0, 1])',
        "Task 'a': data must be a LightningDataModule or loaders by stage, with 'train' and perhaps",
    ),
    (
        'Task("a", torch.randn(4, 4), classes=[0, 1])',
        "Task 'a': data must be a LightningDataModule or loaders by stage, with 'train' and perhaps",
    ),
    (
        'Task("a", np.zeros((4, 4)), classes=[0, 1])',
        "Task 'a': data must be a LightningDataModule or loaders by stage, with 'train' and perhaps",
    ),
    (
        'Task("a", Data, classes=[0, 1])',
        "Task 'a': data must be a LightningDataModule or loaders by stage, with 'train' and perhaps",
    ),
    (
        'Task("a", net(), classes=[0, 1])',
        "Task 'a': data must be a LightningDataModule or loaders by stage, with 'train' and perhaps",
    ),
    (
        'Task("a", {}, classes=[0, 1])',
        "Task 'a': data must be a LightningDataModule or loaders by stage, with 'train' and perhaps",
    ),
    (
        'Task("a", {"val": loader}, classes=[0, 1])',
        "Task 'a': data must be a LightningDataModule or loaders by stage, with 'train' and perhaps",
    ),
    (
        'Task("a", {"train": loader, "tests": loader}, classes=[0, 1])',
        "Task 'a': data must be a LightningDataModule or loaders by stage, with 'train' and perhaps",
    ),
    (
        'Task("a", {"train": None}, classes=[0, 1])',
        "Task 'a': data['train'] must be a DataLoader, or something else that gives batches; got a",
    ),
    (
        'Task("a", {"train": 5}, classes=[0, 1])',
        "Task 'a': data['train'] must be a DataLoader, or something else that gives batches; got a int.",
    ),
    (
        'Task("a", {"train": loader, "val": 5}, classes=[0, 1])',
        "Task 'a': data['val'] must be a DataLoader, or something else that gives batches; got a int.",
    ),
    (
        'Task("a", {1: loader, "train": loader}, classes=[0, 1])',
        "Task 'a': data must be a LightningDataModule or loaders by stage, with 'train' and perhaps",
    ),
    (
        'Task("a", {"train": "file.csv"}, classes=[0, 1])',
        "Task 'a': data['train'] must be a DataLoader, or something else that gives batches; got a str.",
    ),
    ('Task("a", data)', "Task 'a' needs classes=[...] or outputs=[...]: what of the head is its own? Or evaluate=...,"),
    ('Task("a", data, classes=5)', "Task 'a': classes must be a list of whole numbers, got 5."),
    ('Task("a", data, classes="01")', "Task 'a': classes must be a list of whole numbers, got '01'."),
    ('Task("a", data, classes=[])', "Task 'a': classes must be whole numbers from 0 on, got []."),
    ('Task("a", data, classes=["0", "1"])', "Task 'a': classes must be whole numbers from 0 on, got ['0', '1']."),
    ('Task("a", data, classes=[0, 0])', "Task 'a': classes must differ from one another, got [0, 0]."),
    ('Task("a", data, classes=[-1, 0])', "Task 'a': classes must be whole numbers from 0 on, got [-1, 0]."),
    ('Task("a", data, classes=[0.5, 1])', "Task 'a': classes must be whole numbers from 0 on, got [0.5, 1]."),
    ('Task("a", data, classes=[True, False])', "Task 'a': classes must be whole numbers from 0 on, got [True, False]."),
    ('Task("a", data, classes=[[0, 1]])', "Task 'a': classes must be whole numbers from 0 on, got [[0, 1]]."),
    ('Task("a", data, classes=[0, None])', "Task 'a': classes must be whole numbers from 0 on, got [0, None]."),
    (
        'Task("a", data, classes=torch.eye(2))',
        "Task 'a': classes must be whole numbers from 0 on, got [tensor([1., 0.]), tensor([0., 1.])].",
    ),
    ('Task("a", data, classes={0: "zero"})', "Task 'a': classes must be a list of whole numbers, got a dict."),
    ('Task("a", data, classes=float("nan"))', "Task 'a': classes must be a list of whole numbers, got nan."),
    ('Task("a", data, outputs=5)', "Task 'a': outputs must be a list of whole numbers, got 5."),
    ('Task("a", data, outputs="01")', "Task 'a': outputs must be a list of whole numbers, got '01'."),
    ('Task("a", data, outputs=[-1])', "Task 'a': outputs must be whole numbers from 0 on, got [-1]."),
    ('Task("a", data, outputs=[0, 0])', "Task 'a': outputs must differ from one another, got [0, 0]."),
    ('Task("a", data, outputs=[0.0])', "Task 'a': outputs must be whole numbers from 0 on, got [0.0]."),
    (
        'Task("a", data, classes=[0, 1], outputs=[0])',
        "Task 'a' has 2 classes [0, 1] but 1 outputs [0]; give one output a class.",
    ),
    ('Task("a", data, classes=[0, 1], outputs=[])', "Task 'a': outputs must be whole numbers from 0 on, got []."),
    (
        'Task("a", data, classes=[0, 1], metric="accuracy")',
        "Task 'a': metric must be one torchmetrics Metric, such as BinaryAccuracy(), got 'accuracy'.",
    ),
    (
        'Task("a", data, classes=[0, 1], metric=BinaryAccuracy)',
        "Task 'a': metric must be one torchmetrics Metric, such as BinaryAccuracy(), got the class",
    ),
    (
        'Task("a", data, classes=[0, 1], metric=lambda p, t: 0)',
        "Task 'a': metric must be one torchmetrics Metric, such as BinaryAccuracy(), got a function.",
    ),
    (
        'Task("a", data, classes=[0, 1], metric=nn.CrossEntropyLoss())',
        "Task 'a': metric must be one torchmetrics Metric, such as BinaryAccuracy(), got a",
    ),
    (
        'Task("a", data, classes=[0, 1], metric={"acc": BinaryAccuracy()})',
        "Task 'a': metric must be one torchmetrics Metric, such as BinaryAccuracy(), got a dict.",
    ),
    (
        'Task("a", data, classes=[0, 1], metric=MetricCollection([BinaryAccuracy()]))',
        "Task 'a': metric must be one torchmetrics Metric, such as BinaryAccuracy(), got a",
    ),
    ('Task("a", data, classes=[0, 1], evaluate=3)', "Task 'a': evaluate must be a function of (module, batch); got 3."),
    (
        'Task("a", data, classes=[0, 1], evaluate="accuracy")',
        "Task 'a': evaluate must be a function of (module, batch); got 'accuracy'.",
    ),
    (
        'Task("a", data, classes=[0, 1], evaluate=lambda module: module)',
        "Task 'a': evaluate must be a function of (module, batch); the one given takes others: too many",
    ),
    (
        'Task("a", data, classes=[0, 1], evaluate=lambda: 0)',
        "Task 'a': evaluate must be a function of (module, batch); the one given takes others: too many",
    ),
    ('Task("a", data, classes=[0, 1], holdout="x")', "Task 'a': holdout must be a share in [0, 1], got 'x'."),
    ('Task("a", data, classes=[0, 1], holdout=None)', "Task 'a': holdout must be a share in [0, 1], got None."),
    ('Task("a", data, classes=[0, 1], holdout=1)', "Task 'a': holdout=1 leaves nothing to train on; keep it below 1."),
    ('Task("a", data, classes=[0, 1], holdout=-0.1)', "Task 'a': holdout must be a share in [0, 1], got -0.1."),
    ('Task("a", data, classes=[0, 1], holdout=True)', "Task 'a': holdout must be a share in [0, 1], got True."),
]
"""A task."""

RUNNER = [
    ("start(tasks=task())", "runner: tasks must be a list of Tasks, got one; give [Task('a', ...)]."),
    ("start(tasks=None)", "runner: tasks must be a list of Tasks, got None."),
    ("start(tasks=5)", "runner: tasks must be a list of Tasks, got 5."),
    ('start(tasks="tasks")', "runner: tasks must be a list of Tasks, got 'tasks'."),
    ("start(tasks=[])", "runner: tasks is empty; give at least one Task."),
    ("start(tasks=[task(), None])", "runner: tasks must be Task objects, got a NoneType."),
    ("start(tasks=[data])", "runner: tasks must be Task objects, got a dict."),
    ("start(tasks=[task(), task()])", "runner: two tasks are called 'a'; give each a name of its own."),
    ('start(tasks={"a": task()})', "runner: tasks must be a list of Tasks, got a dict."),
    ("start(tasks=[Task])", "runner: tasks must be Task objects, got a type."),
    (
        "ContinualModule(net(), task_inference=None)",
        "ContinualModule takes the LightningModule alone, got task_inference= too. Options belong to the callbacks",
    ),
    ("ContinualModule(net(), 3)", "ContinualModule takes the LightningModule alone, got 3 too."),
    ("start(module=None)", "ContinualModule wraps a LightningModule, got NoneType; give a plain network its loss and"),
    (
        "start(module=nn.Linear(64, 2))",
        "ContinualModule wraps a LightningModule, got Linear; give a plain network its loss and",
    ),
    (
        "start(module=Classifier)",
        "ContinualModule wraps a LightningModule, got type; give a plain network its loss and optimiser",
    ),
    (
        'start(module="net")',
        "ContinualModule wraps a LightningModule, got str; give a plain network its loss and optimiser",
    ),
    (
        "start(trainer=Trainer())",
        "runner: trainer must make Trainers from keywords, one a phase, such as Trainer itself or",
    ),
    ("start(trainer=None)", "runner: trainer must make Trainers from keywords, one a phase, such as Trainer itself or"),
    (
        'start(trainer="cpu")',
        "runner: trainer must make Trainers from keywords, one a phase, such as Trainer itself or",
    ),
    ("start(trainer={})", "runner: trainer must make Trainers from keywords, one a phase, such as Trainer itself or"),
    (
        "start(trainer=lambda: Trainer())",
        "runner: the trainer cannot be made: <lambda>() got an unexpected keyword argument 'max_epochs'",
    ),
    (
        "start(trainer=lambda **options: None)",
        "runner: trainer must make a Trainer from keywords, but made a NoneType.",
    ),
    (
        "start(trainer=lambda **options: Trainer(logger=False))",
        "runner: trainer must hand its keywords (max_epochs, callbacks, default_root_dir) on to the",
    ),
    ("start(trainer=lambda **options: options)", "runner: trainer must make a Trainer from keywords, but made a dict."),
    (
        "start(trainer=partial(Trainer, bogus=1))",
        "runner: the trainer cannot be made: Trainer.__init__() got an unexpected keyword argument",
    ),
    (
        "start(trainer=partial(Trainer, max_epochs=3))",
        "runner: the trainer sets max_epochs=3; the runner's epochs=1 and invariance_epochs=1 decide.",
    ),
    (
        'start(trainer=partial(Trainer, strategy="ddp_spawn", accelerator="cpu", devices=2, logger=False))',
        "strategy='ddp_spawn' and its relatives run the fit in processes whose callback state and",
    ),
    (
        'start(trainer=partial(Trainer, strategy="ddp_fork", accelerator="cpu", devices=2, logger=False))',
        "strategy='ddp_spawn' and its relatives run the fit in processes whose callback state and",
    ),
    (
        'start(trainer=partial(Trainer, strategy="ddp_notebook", accelerator="cpu", devices=2, logger=False))',
        "strategy='ddp_spawn' and its relatives run the fit in processes whose callback state and",
    ),
    (
        'start(trainer=partial(Trainer, strategy="ddp_spawn", accelerator="cpu", devices=1, logger=False))',
        "strategy='ddp_spawn' and its relatives run the fit in processes whose callback state and",
    ),
    (
        'start(trainer=partial(Trainer, strategy="bogus"))',
        "runner: the trainer cannot be made: You selected an invalid strategy name: `strategy='bogus'`.",
    ),
    (
        'start(trainer=partial(Trainer, accelerator="bogus"))',
        "runner: the trainer cannot be made: You selected an invalid accelerator name:",
    ),
    (
        "start(trainer=partial(Trainer, devices=0))",
        "runner: the trainer cannot be made: `Trainer(devices=0)` value is not a valid input using cpu",
    ),
    (
        'start(trainer=partial(Trainer, precision="7"))',
        "runner: the trainer cannot be made: Precision '7' is invalid. Allowed precision values:",
    ),
    (
        "start(trainer=partial(Trainer, callbacks=3))",
        "runner: the trainer's callbacks must be a list of Callbacks, got 3.",
    ),
    (
        'start(trainer=partial(Trainer, callbacks=["x"]))',
        "runner: the trainer's callbacks must be a list of Callbacks, got a str in it.",
    ),
    (
        'start(trainer=partial(Trainer, accelerator="cpu", logger=False, max_steps=0))',
        "runner: the trainer sets max_steps=0, so that nothing would train; leave it out.",
    ),
    (
        'start(trainer=partial(Trainer, accelerator="cpu", logger=False, limit_train_batches=0))',
        "runner: the trainer sets limit_train_batches=0, so that nothing would train; leave it out.",
    ),
    ('start(epochs="6")', "runner: epochs must be a whole number of at least 1, got '6'."),
    ("start(epochs=True)", "runner: epochs must be a whole number of at least 1, got True."),
    ("start(epochs=0)", "runner: epochs must be a whole number of at least 1, got 0."),
    ("start(epochs=2.0)", "runner: epochs must be a whole number of at least 1, got 2.0."),
    ("start(epochs=None)", "runner: epochs must be a whole number of at least 1, got None."),
    ("start(invariance_epochs=-1)", "runner: invariance_epochs must be a whole number of at least 0, got -1."),
    ('start(invariance_epochs="4")', "runner: invariance_epochs must be a whole number of at least 0, got '4'."),
    ("start(invariance_epochs=None)", "runner: invariance_epochs must be a whole number of at least 0, got None."),
    ("start(partition=True)", "runner: partition must be a PartitionCallback(...), or None to leave it out, got True."),
    (
        'start(partition="auto")',
        "runner: partition must be a PartitionCallback(...), or None to leave it out, got 'auto'.",
    ),
    (
        "start(partition=PartitionCallback)",
        "runner: partition must be a PartitionCallback(...), or None to leave it out, got the class",
    ),
    (
        "start(partition=InvarianceCallback())",
        "runner: partition must be a PartitionCallback(...), or None to leave it out, got a",
    ),
    (
        "start(partition=PartitionOptions())",
        "runner: partition must be a PartitionCallback(...), or None to leave it out, got a",
    ),
    (
        "start(partition=PartitionCallback(after=0.5))",
        "runner: the partition has after=0.5; epochs=1 and invariance_epochs=1 decide when a task is",
    ),
    (
        "start(invariance=True)",
        "runner: invariance must be a InvarianceCallback(...), or None to leave it out, got True.",
    ),
    (
        "start(invariance=Noise())",
        "runner: invariance must be a InvarianceCallback(...), or None to leave it out, got a Noise.",
    ),
    (
        'start(invariance="noise")',
        "runner: invariance must be a InvarianceCallback(...), or None to leave it out, got 'noise'.",
    ),
    (
        "start(invariance=PartitionCallback())",
        "runner: invariance must be a InvarianceCallback(...), or None to leave it out, got a",
    ),
    (
        "start(masking=True)",
        "runner: masking must be a MaskedGradientCallback(...), or None to leave it out, got True.",
    ),
    (
        "start(masking=False)",
        "runner: masking must be a MaskedGradientCallback(...), or None to leave it out, got False.",
    ),
    (
        "start(masking=RandomSubspace())",
        "runner: masking must be a MaskedGradientCallback(...), or None to leave it out, got a",
    ),
    (
        "start(masking=MaskedGradientCallback(subspace=LearnedSubspace()))",
        "runner: masking trains in a sub-space that is learned, but nothing learns it; give invariance",
    ),
    ("start(task_inference=True)", "runner: task_inference must be the name of a strategy, a Strategy, a"),
    (
        'start(task_inference="best")',
        "task_inference: strategy must be one of auto, statistics, unchanged, all, plain, joint,",
    ),
    ("start(task_inference=3)", "runner: task_inference must be the name of a strategy, a Strategy, a"),
    (
        "start(task_inference=TaskInferenceCallback)",
        "runner: task_inference must be the name of a strategy, a Strategy, a",
    ),
    ('start(callbacks="early")', "runner: callbacks must be a list of Callbacks, got 'early'."),
    ("start(callbacks=[Timer])", "runner: callbacks must be a list of Callbacks, got the class Timer in it."),
    ("start(callbacks=[3])", "runner: callbacks must be a list of Callbacks, got a int in it."),
    (
        "start(callbacks=[PartitionCallback()])",
        "runner: callbacks holds a PartitionCallback, which the runner gives each phase itself; hand it",
    ),
    ('start(callbacks={"a": Timer()})', "runner: callbacks must be a list of Callbacks, got a dict."),
    ('start(isolation="some")', "runner: isolation must be one of exact, perturb, got 'some'."),
    ("start(isolation=None)", "runner: isolation must be one of exact, perturb, got None."),
    ('start(method="both")', "runner: method must be one of partition, finetune, joint, got 'both'."),
    ("start(method=None)", "runner: method must be one of partition, finetune, joint, got None."),
    ("start(pretrained=None)", "runner: pretrained must be True, False or the path of a checkpoint, got None."),
    ("start(pretrained=3)", "runner: pretrained must be True, False or the path of a checkpoint, got 3."),
    ('start(pretrained="none.ckpt")', "runner: pretrained='none.ckpt' is no file; give a checkpoint, or True."),
    ('start(pretrained="")', "runner: pretrained='' is no file; give a checkpoint, or True."),
    ("start(pretrained={})", "runner: pretrained must be True, False or the path of a checkpoint, got a dict."),
    ("start(pretrained=[])", "runner: pretrained must be True, False or the path of a checkpoint, got a list."),
    ('start(score_on="train")', "runner: score_on must be one of test, validation, got 'train'."),
    ("start(score_on=None)", "runner: score_on must be one of test, validation, got None."),
    ("start(seed=None)", "runner: seed must be a whole number of at least 0, got None."),
    ('start(seed="0")', "runner: seed must be a whole number of at least 0, got '0'."),
    ("start(seed=-1)", "runner: seed must be a whole number of at least 0, got -1."),
    ("start(seed=1.0)", "runner: seed must be a whole number of at least 0, got 1.0."),
    ("start(root=None)", "runner: root must be the path of a folder, got None."),
    ('start(root="")', "runner: root must be the path of a folder, got ''."),
    ('start(root="   ")', "runner: root must be the path of a folder, got ' '."),
    ("start(root=5)", "runner: root must be the path of a folder, got 5."),
    ("start(root=True)", "runner: root must be the path of a folder, got True."),
    ("start(root=__file__)", "is a file, where a folder is needed."),
    ('start(root=Path(__file__) / "run")', "is a"),
    ('start(root="a\\x00b")', "runner: root must be the path of a folder, got 'a\\x00b'."),
    (
        'start(root="/proc/nowhere/run")',
        "/proc/nowhere/run cannot be written: No such file or directory.",
    ),
    (
        'start(method="joint", tasks=[Task("a", {"train": [batch()]}, classes=[0, 1])])',
        "method='joint' mixes the samples of all tasks, but task 'a' gives no DataLoader over a",
    ),
    (
        'start(method="joint", tasks=[Task("a", {"train": DataLoader(dataset, batch_size=None)}, classes=[0, 1])])',
        "Task 'a': ContinualNet cannot run on its first batch: Dimension out of range (expected to be",
    ),
]
"""What the runner is made and started with."""

RECORDS = [
    ("PartitionRecord.load(None)", "PartitionRecord: folder must be the path of a folder, got None."),
    ("PartitionRecord.load(5)", "PartitionRecord: folder must be the path of a folder, got 5."),
    ('PartitionRecord.load("nowhere")', "nowhere holds no record of a partition; give a folder with a partition.json."),
    ('PartitionRecord.load("")', "PartitionRecord: folder must be the path of a folder, got ''."),
    ("PartitionRecord.load(text_file)", "holds no record of a partition; give a folder with a partition.json."),
    ("NeuronLedger.from_checkpoint(None)", "NeuronLedger: path must be the path of a folder, got None."),
    (
        'NeuronLedger.from_checkpoint("nowhere.ckpt")',
        "NeuronLedger: nowhere.ckpt is no file; give a checkpoint of Lightning's.",
    ),
    ("NeuronLedger.from_checkpoint(folder)", "is no file; give a checkpoint of Lightning's."),
    ("NeuronLedger.from_checkpoint(text_file)", "is no checkpoint that can be read safely: it is damaged, or holds"),
    (
        "NeuronLedger.from_checkpoint(saved(torch.ones(3)))",
        "holds no ledger: it was written without lightning_cf's callbacks, or",
    ),
    (
        'NeuronLedger.from_checkpoint(saved({"state_dict": {}}))',
        "holds no ledger: it was written without lightning_cf's callbacks, or",
    ),
    (
        'NeuronLedger.from_checkpoint(saved({"lightning_cf": None}))',
        "This is no ledger that NeuronLedger.state_dict() gave: TypeError: 'NoneType' object is not",
    ),
    (
        'NeuronLedger.from_checkpoint(saved({"lightning_cf": {"owners": 5}}))',
        "This is no ledger that NeuronLedger.state_dict() gave: AttributeError: 'int' object has no",
    ),
    (
        "NeuronLedger.from_checkpoint(saved(nn.Linear(2, 2)))",
        "is no checkpoint that can be read safely: it is damaged, or holds more",
    ),
    (
        "NeuronLedger.from_state_dict(None)",
        "This is no ledger that NeuronLedger.state_dict() gave: TypeError: 'NoneType' object is not",
    ),
    (
        "NeuronLedger.from_state_dict({})",
        "This is no ledger that NeuronLedger.state_dict() gave: KeyError: 'owners'. Read one with",
    ),
    (
        'NeuronLedger.from_state_dict({"owners": {}})',
        "This is no ledger that NeuronLedger.state_dict() gave: KeyError: 'outputs'. Read one with",
    ),
    (
        "keep_ledger(None, known().ledger)",
        "keep_ledger: module must be the network that the ledger is about, got None.",
    ),
    (
        "keep_ledger(net(), None)",
        "keep_ledger: ledger must be a NeuronLedger, such as from_checkpoint(path) reads, got None.",
    ),
    (
        "keep_ledger(net(), {})",
        "keep_ledger: ledger must be a NeuronLedger, such as from_checkpoint(path) reads, got a dict.",
    ),
    (
        "keep_ledger(net(), net())",
        "keep_ledger: ledger must be a NeuronLedger, such as from_checkpoint(path) reads, got a Net.",
    ),
    (
        "ContinualModule(net()).predict(X)",
        "ContinualNet knows no task that it could infer: seal one first, with a TaskInferenceCallback",
    ),
    (
        "ContinualModule(net()).predict(None)",
        "predict: x must be a batch of inputs, as forward takes it, got a NoneType.",
    ),
    ("trained().predict(None)", "predict: x must be a batch of inputs, as forward takes it, got a NoneType."),
    ('trained().predict("x")', "predict: x must be a batch of inputs, as forward takes it, got a str."),
    (
        'trained().predict(X, strategy="best")',
        "task_inference='best' was not fitted when the tasks were sealed; what was: lda, lda_units",
    ),
    (
        "trained().predict(X, strategy=3)",
        "task_inference='3' was not fitted when the tasks were sealed; what was: lda, lda_units",
    ),
    ("known().add_task(None)", "ContinualModule: task must be a Task(name, data, classes=[...]), got None."),
    ('known().add_task("a")', "ContinualModule: task must be a Task(name, data, classes=[...]), got 'a'."),
    ("known().add_task(data)", "ContinualModule: task must be a Task(name, data, classes=[...]), got a dict."),
    ('known().add_task([task("b")])', "ContinualModule: task must be a Task(name, data, classes=[...]), got a list."),
    (
        "known().add_task(Task)",
        "ContinualModule: task must be a Task(name, data, classes=[...]), got the class Task; call it.",
    ),
    (
        'known().ledger.begin("never reserved", [0])',
        "Task 'never reserved' cannot start: no outputs are set aside for it; reserve them first, or say which they",
    ),
    (
        'known().ledger.reserve("b", [99])',
        "Task 'b' needs output 99, but the output head has 4 columns (0 to 3). Widen the head, the old",
    ),
    ('known().ledger.reserve("b", ["0"])', "Task 'b': outputs must be whole numbers, got '0'."),
    ('known().ledger.reserve("b", None)', "Task 'b': outputs must be a list of columns, got None."),
]
"""Records, ledgers and what a ContinualModule is asked."""

FITS = [
    ("fit(None)", "PartitionCallback: the Trainer got no datamodule; wrap the data in a Task that says its name"),
    ("fit(data)", "PartitionCallback: the Trainer got no datamodule; wrap the data in a Task that says its name"),
    ("fit(loader)", "PartitionCallback: the Trainer got no datamodule; wrap the data in a Task that says its name"),
    ("fit(Data())", "PartitionCallback: the Trainer got a Data; wrap the data in a Task that says its name and"),
    ("fit([task()])", "PartitionCallback: the Trainer got no datamodule; wrap the data in a Task that says its name"),
    (
        "fit(task(classes=[0, 9]))",
        "Task 'a' declares classes [0, 9], but its data holds label 1; correct classes=[...] or the",
    ),
    (
        "fit(task(classes=[5, 6]))",
        "Task 'a' declares classes [5, 6], but its data holds label 0; correct classes=[...] or the",
    ),
    (
        "fit(over(X.double()))",
        "Task 'a': its inputs are float64, the weights float32, and the training step does not take",
    ),
    (
        "fit(over(X.half()))",
        "Task 'a': its inputs are float16, the weights float32, and the training step does not take",
    ),
    ("fit(over(X.to(torch.uint8)))", "cannot run on its first batch: mat1 and mat2 must have the same dtype"),
    ("fit(over(X.long()))", "cannot run on its first batch: mat1 and mat2 must have the same dtype"),
    ("fit(over(X.bool()))", "cannot run on its first batch: mat1 and mat2 must have the same dtype"),
    ("fit(over(X.to(torch.complex64)))", "cannot run on its first batch: mat1 and mat2 must have the same dtype"),
    (
        "fit(over(X[:, :5]))",
        "Task 'a': Net cannot run on its first batch: mat1 and mat2 shapes cannot be multiplied (2x5",
    ),
    (
        "fit(over(X[:0], Y[:0]))",
        "Task 'a' has no training data: its train_dataloader() yields no batch with samples. Check the",
    ),
    (
        "fit(over(X, Y + 5))",
        "Task 'a' declares classes [0, 1], but its data holds label 5; correct classes=[...] or the",
    ),
    (
        "start(tasks=[over(X.double())])",
        "Task 'a': its inputs are float64, the weights float32, and the training step does not take",
    ),
    (
        'start(tasks=[task(), over(X.double(), name="b")])',
        "Task 'b': its inputs are float64, the weights float32, and the training step does not take",
    ),
    (
        "start(tasks=[over(X.half())])",
        "Task 'a': its inputs are float16, the weights float32, and the training step does not take",
    ),
    ("start(tasks=[over(X.to(torch.uint8))])", "cannot run on its first batch: mat1 and mat2 must have the same dtype"),
    (
        "start(tasks=[over(X[:, :5])])",
        "Task 'a': ContinualNet cannot run on its first batch: mat1 and mat2 shapes cannot be",
    ),
    (
        "start(tasks=[over(X[:0], Y[:0])])",
        "Task 'a' has no training data: its train_dataloader() yields no batch with samples. Check the",
    ),
    (
        "start(tasks=[task(classes=[0, 9])])",
        "Task 'a' declares classes [0, 9], but its data holds label 1; correct classes=[...] or the",
    ),
    (
        'start(tasks=[task(classes=[0, 9]), task("b")], module=net(2))',
        "Task 'a' declares classes [0, 9], but its data holds label 1; correct classes=[...] or the",
    ),
    (
        'start(tasks=[Task("a", {"train": dataset}, classes=[0, 1])])',
        "Task 'a': ContinualNet cannot run on its first batch: Dimension out of range (expected to be",
    ),
    (
        'start(tasks=[Task("a", {"train": [1, 2, 3]}, classes=[0, 1])])',
        "Task 'a': its batches are no (input, target) pairs, so there is no example to trace",
    ),
    (
        'start(tasks=[Task("a", {"train": [("x", "y")]}, classes=[0, 1])])',
        "Task 'a': ContinualNet cannot run on its first batch: 'str' object has no attribute 'flatten'",
    ),
    (
        'start(tasks=[Task("a", {"train": [{"x": X, "y": Y}]}, classes=[0, 1])])',
        "Task 'a': its batches are no (input, target) pairs, so there is no example to trace",
    ),
    (
        'start(tasks=[Task("a", {"train": [None]}, classes=[0, 1])])',
        "Task 'a' has no training data: its train_dataloader() yields no batch with samples. Check the",
    ),
    (
        'start(tasks=[Task("a", {"train": []}, classes=[0, 1])])',
        "Task 'a' has no training data: its train_dataloader() yields no batch with samples. Check the",
    ),
    (
        "start(tasks=[task(evaluate=lambda module, batch: None)])",
        "Task 'a': its evaluate gives a NoneType, not two tensors; let it return (predictions, target).",
    ),
    (
        "start(tasks=[task(evaluate=lambda module, batch: module(batch[0]))])",
        "Task 'a': its evaluate gives a Tensor, not two tensors; let it return (predictions, target).",
    ),
    (
        "start(tasks=[task(evaluate=lambda module, batch: (module(batch[0]) * 0, batch[1]))])",
        "Task 'a': its evaluate predicts the same whatever the network's weights are, so that no partition can be",
    ),
    (
        "start(tasks=[task(evaluate=lambda net, batch: (net(batch[0]), (torch.eye(2)[batch[1]], batch[1]))[1])])",
        "Task 'a': its evaluate predicts the same whatever the network's weights are, so that no partition can be",
    ),
    (
        'start(tasks=[task(evaluate=lambda module, batch: ("a", "b"))])',
        "Task 'a': its evaluate gives predictions of type str, not a tensor.",
    ),
    (
        "start(tasks=[task(evaluate=lambda module, batch: module.nothing)])",
        "Task 'a': ContinualNet cannot run on its first batch: 'ContinualNet' object has no attribute",
    ),
    (
        "start(tasks=[task(metric=MeanSquaredError())])",
        "Task 'a' cannot be scored: Predictions and targets are expected to have the same shape, but",
    ),
    ("start(module=Silent())", "No `training_step()` method defined. Lightning `Trainer` expects as minimum a"),
    (
        "start(module=NoOptimizer())",
        "No `configure_optimizers()` method defined. Lightning `Trainer` expects as minimum a",
    ),
    (
        "start(module=returning(None))",
        "The network cannot be traced: no layer with weights computes its output, which nothing gives.",
    ),
    (
        'start(module=returning("x"))',
        "The network cannot be traced: no layer with weights computes its output, which nothing gives.",
    ),
    (
        'start(module=returning({"logits": 1}))',
        "The network cannot be traced: no layer with weights computes its output, which nothing gives.",
    ),
    ("start(module=LightningModule())", "Task 'a': ContinualLightningModule cannot run on its first batch: Module"),
    (
        'start(trainer=partial(quiet, callbacks=[ModelPruning("l1_unstructured")]))',
        "ModelPruning sets weights to zero, those of owned units too, and renames parameters. Take it",
    ),
    (
        'start(trainer=partial(quiet, strategy="fsdp"))',
        "runner: the trainer cannot be made: The strategy `fsdp` requires a GPU accelerator, but",
    ),
    (
        'start(trainer=partial(quiet, plugins="x"))',
        "runner: the trainer cannot be made: Found invalid type for plugin x. Expected one of:",
    ),
    (
        'start(partition=PartitionCallback(layers=["nothing"]))',
        "partition: layers names 'nothing', but the network has no such layer of hidden units; it has",
    ),
    (
        'start(partition=PartitionCallback(exclude=["network.9"]))',
        "partition: exclude names 'network.9', but the network has no such layer of hidden units; it",
    ),
    (
        'start(partition=PartitionCallback(exclude=["network"]))',
        "partition: layers and exclude leave no layer to partition; a layer whose units all share one",
    ),
    (
        'start(invariance=InvarianceCallback(subspace=GivenSubspace({"nothing": torch.eye(8)})))',
        "subspace: there is a basis for 'nothing', but the network has no such layer of hidden units;",
    ),
    (
        'start(invariance=InvarianceCallback(subspace=GivenSubspace({"network.1": torch.eye(5)})))',
        "subspace: the basis of 'network.1' has 5 rows, but weight vectors there have 8 entries.",
    ),
    (
        'start(invariance=InvarianceCallback(perturbation=lambda vectors: vectors), isolation="perturb")',
        "invariance: perturbation must be a function of (vectors, generator); the one given takes",
    ),
    (
        'start(invariance=InvarianceCallback(perturbation=Affine(matrix=torch.eye(3))), isolation="perturb")',
        "Affine: matrix must be 8 x 8 for units of 8 inputs, got 3 x 3; give a callable (inputs,",
    ),
    (
        'start(invariance=InvarianceCallback(perturbation=lambda v, g: v[:1]), isolation="perturb")',
        "invariance: the perturbation must give a tensor [12, 8] for the units of 'network.1', one row",
    ),
    (
        'start(tasks=[task(n) for n in "abcdefghijklmno"])',
        "runner: 'network.1' has 12 units for 15 tasks, each of which must own at least one. Widen the",
    ),
    ("start(pretrained=saved(torch.ones(3)))", "does not fit the module: 6 names are in one of the"),
    ('start(pretrained=saved({"a": 1}))', "does not fit the module: 7 names are in one of the"),
    ("start(pretrained=text_file)", "is no checkpoint that torch.load reads."),
    ("start(pretrained=folder)", "is no file; give a checkpoint, or True."),
    (
        'start(pretrained=True, partition=PartitionCallback(measure="update"))',
        "runner: measure='update' compares with the weights before a task was learned, which a",
    ),
]
"""Networks and data that cannot be trained."""

COMMANDS = [
    ("dance", "verb must be one of train, doctor, got 'dance'."),
    ("train dance", "Error parsing override 'dance' missing EQUAL at '<EOF>'"),
    ("--config-name=none", "Cannot find primary config 'none'. Check that it's in your config search path."),
    ("--config-dir=nowhere", "not found"),
    ("--config-dir=broken tasks=mine", "line 1,"),
    ("--config-dir=broken +broken=one", "Invalid loaded object type: int"),
    ("tasks=nothing", "In 'config': Could not find 'tasks/nothing' Available options in 'tasks': permuted_digits"),
    ("model=nothing", "In 'config': Could not find 'model/nothing' Available options in 'model': cnn mlp resnet"),
    ("invariance=spin", "In 'config': Could not find 'invariance/spin' Available options in 'invariance': ablate"),
    ("hydra/sweeper=optuna", "In 'hydra/config': Could not find 'hydra/sweeper/optuna' Available options in"),
    ("hydra/nothing=x", "Could not override 'hydra/nothing'. To append to your config use +hydra/nothing=x Key"),
    (
        "tasks=[split_digits,permuted_digits]",
        "the configuration: lightning_cf.data.sequences.permuted_tasks cannot be made:",
    ),
    ("nonsense=1", "Could not override 'nonsense'. To append to your config use +nonsense=1 Key 'nonsense' is"),
    ("partition.nonsense=1", "Could not override 'partition.nonsense'. To append to your config use"),
    ("+partition.nonsense=1", "partition: there is no option 'nonsense'; there are clusters, exclude, fold, layers,"),
    (
        "+model.network.nonsense=1",
        "model.network: lightning_cf.models.networks.MLP cannot be made: MLP.__init__() got an unexpected",
    ),
    ("+tasks.nonsense=1", "the configuration: lightning_cf.data.sequences.split_tasks cannot be made: split_tasks()"),
    ("+trainer.bogus=1", "runner: the trainer cannot be made: Trainer.__init__() got an unexpected keyword argument"),
    ("~tasks", "Key 'tasks' is not in struct Key: tasks"),
    ("~nothing", "Could not delete from config. 'nothing' does not exist."),
    ("==", "Error parsing override '==' extraneous input '=' expecting {<EOF>, ':', BRACKET_OPEN,"),
    ("=5", "Config group override must be a string or a list. Got int"),
    ("epochs", "verb must be one of train, doctor, got 'epochs'."),
    ("epochs=[", "no viable alternative at input '['"),
    ("epochs=true", "runner: epochs must be a whole number of at least 1, got True."),
    ("epochs=null", "runner: epochs must be a whole number of at least 1, got None."),
    ("epochs=six", "runner: epochs must be a whole number of at least 1, got 'six'."),
    ("seed=-1", "seed must be a whole number of at least 0, got -1."),
    ("compare=maybe", "compare must be true or false, got 'maybe'."),
    ("optimized_metric=null", "optimized_metric must be a text that is not blank, got None."),
    ("pretrained=true", "pretrained must be a checkpoint or null, got True."),
    ("pretrained=file.txt", "runner: pretrained='file.txt' is no checkpoint that torch.load reads."),
    ("tasks=split_mnist", "MNIST needs data_dir=FOLDER, the folder that holds MNIST/raw with the IDX files."),
    ("tasks=split_mnist data_dir=5", "MNIST: data_dir must be the path of a folder, got 5."),
    ("devices=0", "runner: the trainer cannot be made: `Trainer(devices=0)` value is not a valid input using"),
    ("devices=1.5", "runner: the trainer cannot be made: `devices` selected with `CPUAccelerator` should be an"),
    ("nodes=0", "runner: the trainer cannot be made: `num_nodes` must be a positive integer, but got 0."),
    ("run=", "run must be a folder, such as run=runs/first, got"),
    ("run=' '", "run must be a folder, such as run=runs/first, got"),
    ("run=null", "run must be a folder, such as run=runs/first, got"),
    ("run=file.txt", "runner: root='file.txt' cannot be a"),
    ("run=file.txt/run", "runner: root='file.txt/run' cannot"),
    ("run=[a]", "run must be a folder, such as run=runs/first, got"),
    ("tasks.order=5", "tasks: order must be a list of classes, got 5."),
    ("tasks.augment=5", "ImageData: augment must change a batch of images, got 5."),
    ("tasks.source=null", "tasks: source must be a data set in three parts, such as lightning_cf.data.digits(), got"),
    ("tasks._target_=nowhere.tasks", "the configuration: nowhere.tasks cannot be made: Error loading 'nowhere.tasks':"),
    (
        "tasks._target_=os.getcwd",
        "the configuration: posix.getcwd cannot be made: posix.getcwd() takes no keyword arguments",
    ),
    ("tasks=permuted_digits tasks.seed=x", "tasks: seed must be a whole number of at least 0, got 'x'."),
    ("tasks=rotated_digits tasks.degrees=x", "tasks: degrees must be a finite number, got 'x'."),
    (
        "model._target_=torch.nn.Identity",
        "ContinualModule wraps a LightningModule, got Identity; give a plain network its loss and",
    ),
    ("model.network=null", "Classifier: network must be a network that maps inputs to logits, got None."),
    ("model.network.hidden=5", "MLP: hidden must be a list of whole numbers, got 5."),
    ("model.optimizer=null", "Classifier: optimizer must make an optimiser from parameters, such as"),
    (
        "model.optimizer.lr=x",
        "Classifier: the optimizer cannot be made: '<=' not supported between instances of 'float'",
    ),
    (
        "model.optimizer._target_=torch.nn.Linear",
        "Classifier: the optimizer cannot be made: Linear.__init__() got an unexpected keyword",
    ),
    ("model.cosine=x", "Classifier: cosine must be True or False, got 'x'."),
    ("partition.threshold=x", "partition: threshold must be a number in [-1, 1] or 'auto', got 'x'."),
    ("partition.fold=x", "partition: fold must be True or False, got 'x'."),
    ("partition.monitor=null", "partition: monitor must be a text that is not blank, got None."),
    (
        "partition._target_=lightning_cf.Noise",
        "partition: lightning_cf.invariance.perturbations.Noise cannot be made: Noise.__init__() got an",
    ),
    ("partition=5", "Config group override must be a string or a list. Got int"),
    ("invariance.perturbation=5", "invariance: perturbation must be callable, such as Noise(scale=1.0), got 5."),
    (
        "invariance=noise invariance.perturbation.scale=x",
        "Noise: scale must be a finite number of at least 0, got 'x'.",
    ),
    ("invariance=default", "Missing mandatory value: invariance.perturbation Key: invariance.perturbation"),
    ("subspace=given", "Missing mandatory value: invariance.subspace.bases Key: invariance.subspace.bases"),
    ("masking.subspace=5", "masking: subspace must be a sub-space, such as RandomSubspace(dimensions=0.5), got 5."),
    ("task_inference.lr=x", "task_inference: lr must be a finite number above 0, got 'x'."),
    (
        "+trainer.strategy=ddp_spawn",
        "strategy='ddp_spawn' and its relatives run the fit in processes whose callback state and",
    ),
    ("+trainer.precision=7", "runner: the trainer cannot be made: Precision 7 is invalid. Allowed precision values:"),
    ("+trainer.callbacks=[5]", "runner: the trainer's callbacks must be a list of Callbacks, got a int in it."),
    ("+trainer.max_steps=0", "runner: the trainer sets max_steps=0, so that nothing would train; leave it out."),
    ("trainer._partial_=false", "trainer must make one for each phase: set trainer._partial_=true."),
    (
        "logger=csv +logger.nothing=1",
        "runner: the trainer cannot be made: CSVLogger.__init__() got an unexpected keyword",
    ),
    ("hydra.run.dir=file.txt", "file.txt cannot be used: File exists. Choose another folder with run=FOLDER."),
]
"""Of the command line, which ends with status 1, this sentence in one line and no traceback."""
