"""What infers a task is tried before its first step: whatever would fail at its seal fails, or is left out, by then."""

import warnings
from functools import partial

import pytest
import torch
from adapted import classifier as architecture_classifier
from architectures import ARCHITECTURES
from clouds import INPUTS, Net, clouds, learned, loaders, pair, points
from learning import fit, images, quiet_trainer, three, weights
from lightning.pytorch import Callback
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanSquaredError

from lightning_cf import (
    ContinualError,
    ContinualModule,
    PartitionCallback,
    SequentialTaskRunner,
    Task,
    TaskInferenceCallback,
)
from lightning_cf.data import split_tasks
from lightning_cf.learner.inferring import inference_of, watch_task
from lightning_cf.learner.keeping import state_for, state_of
from lightning_cf.learner.predicting import predict_any
from lightning_cf.learner.rehearsal import rehearse
from lightning_cf.network.forward import named_tensors
from lightning_cf.task_inference import STRATEGIES, Sites, TaskInference, read
from lightning_cf.task_inference.readout import Recorder
from lightning_cf.task_inference.strategies import Strategy
from lightning_cf.task_inference.watching import watch

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no claim within the budget"),
    pytest.mark.filterwarnings("ignore:.*and so it is with random weights"),  # a step or four teach little
    pytest.mark.filterwarnings("ignore:.*finds too little redundancy"),
    pytest.mark.filterwarnings("ignore::lightning_cf.errors.StructureWarning"),
    pytest.mark.filterwarnings("ignore:Lazy modules are a new feature"),
    pytest.mark.filterwarnings("ignore:Plan failed"),
    pytest.mark.filterwarnings("ignore:.*in the forward pass, which belongs to earlier tasks"),
]


def run(module, sequence, root, **options):
    options = {"epochs": 1, "invariance_epochs": 1, "trainer": partial(quiet_trainer, limit_train_batches=4), **options}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        return SequentialTaskRunner(module, sequence, root=root, **options).run()


# What networks show


class Attends(Net):
    """Three tokens of four values through an attention whose projections are one weight."""

    def __init__(self, first=True, cross=False, **options):
        super().__init__()
        self.a = nn.Linear(4, 16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=first, **options)
        self.query = nn.Parameter(torch.randn(2, 16)) if cross else None
        self.b, self.c = nn.Linear(16, 16), nn.Linear(16, 10)
        self.first = first

    def forward(self, x):
        x = F.relu(self.a(x.reshape(len(x), 3, 4)))
        x = x if self.first else x.transpose(0, 1)
        query = x if self.query is None else self.query[None].expand(len(x), -1, -1)
        x = self.attention(query, x, x, need_weights=False)[0]
        return self.c(F.relu(self.b(x)).mean(1 if self.first else 0))


NETWORKS = {
    "samples first": Attends,
    "tokens first": partial(Attends, first=False),
    "other tokens ask": partial(Attends, cross=True),
    "no bias": partial(Attends, bias=False, add_bias_kv=False),
}


@pytest.mark.parametrize(
    "kind", [pytest.param(n, marks=[pytest.mark.slow] if n in ("tokens first", "no bias") else []) for n in NETWORKS]
)
def test_attention_in_one_weight_is_inferred_in_a_runner_with_default_options(kind, tmp_path):
    module = NETWORKS[kind]()
    result = run(module, pair(), tmp_path)
    assert [known.name for known in inference_of(module.ledger).tasks] == ["a", "b"]
    assert result.strategies.keys() == {"lda", "lda_units"}
    x, _ = points([0, 1])
    together, alone = module.predict(x[:3]), [module.predict(x[n : n + 1]) for n in range(3)]
    # As many samples as tokens: only a trial with another number tells which axis is which.
    torch.testing.assert_close(together.scores, torch.cat([one.scores for one in alone]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("first", [True, False])
def test_what_the_projections_read_is_what_they_are_given(first):
    module = Attends(first).eval()
    x = points([0, 1])[0][:5]
    heads = {"c": torch.arange(10)}
    names = ["attention.in_proj_weight", "attention.out_proj.weight"]
    watched = watch(module, names, heads, module, x)
    assert watched.weights == set(names)
    assert watched.second == set(names)  # inside the function tokens always come first
    assert watched.hooked == set()  # no module's own hook sees what happens inside the function
    recorder = Recorder(module, names, heads)
    with recorder.watching(), torch.no_grad():
        found = module(x)
    torch.testing.assert_close(found, module(x))
    given = F.relu(module.a(x.reshape(5, 3, 4))).transpose(0, 1)
    torch.testing.assert_close(recorder.found[names[0]].reshape(given.shape), given)
    q, k, v = F.linear(given, module.attention.in_proj_weight, module.attention.in_proj_bias).chunk(3, dim=-1)
    q, k, v = (t.transpose(0, 1).unflatten(2, (4, 4)).transpose(1, 2) for t in (q, k, v))
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).transpose(0, 1)
    torch.testing.assert_close(recorder.found[names[1]].reshape(mixed.shape), mixed)


@pytest.mark.parametrize(("wanted", "strategy"), [("auto", "energy"), ("input_gaussian", "input_gaussian")])
def test_a_network_that_is_its_output_layer_alone_is_inferred(wanted, strategy, tmp_path):
    class Single(Net):
        def __init__(self):
            super().__init__()
            self.b = self.c = None
            self.a = nn.Linear(12, 10)

        def forward(self, x):
            return self.a(x)

    module = Single()
    result = run(module, pair(), tmp_path, task_inference=wanted)
    assert strategy in result.strategies
    assert [known.name for known in inference_of(module.ledger).tasks] == ["a", "b"]


def test_a_layer_that_reads_no_samples_is_not_looked_at(tmp_path):
    """A network of a table, beside the samples: as long as a batch now and then."""

    class Table(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.randn(32, 3))
            self.bias = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 16))
            self.b = nn.Linear(32 + 16, 32)

        def forward(self, x):
            bias = self.bias(self.table).mean(0).expand(len(x), -1)
            return self.c(F.relu(self.b(torch.cat([F.relu(self.a(x)), bias], dim=1))))

    module = Table()
    run(module, pair(), tmp_path, task_inference="mahalanobis")
    (first, _) = inference_of(module.ledger).tasks
    assert first.sites.inputs == "a.weight"
    assert "bias.2.weight" not in {site.weight for site in first.sites.hidden}
    assert len(module.predict(points([0, 1])[0][:7]).classes) == 7


SOME = ("nn.MultiheadAttention", "weight_norm (parametrized)")
MORE = (
    "MLP with BatchNorm", "deep MLP", "a layer used twice", "weights tied to their transpose", "low-rank adapter",
    "lazy layers", "several inputs", "several heads (ModuleDict)", "bilinear layer", "spectral_norm", "maxout",
    "backbone that the first task keeps (exclude=)", "VGG", "ResNet", "DenseNet", "squeeze-and-excite",
    "CNN with GroupNorm", "grouped convolutions, channels shuffled", "U-Net, transposed convolutions",
    "1-D convolutions", "MLP-Mixer", "ViT", "Swin", "Embedding", "Transformer encoder, norm last",
    "Transformer decoder, tied embedding", "nn.Transformer with a learned query",
    "rotary, grouped-query, SwiGLU, RMSNorm (LLaMA)", "attention pooling by a learned query", "GRU",
    "LSTMCell in a loop", "graph network, messages added up",
)  # fmt: skip
"""Networks that differ in what their layers read; others in the table differ from these in what stands between them."""


@pytest.mark.parametrize("name", [*SOME, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_every_strategy_that_a_network_allows_works_at_its_seal(name, tmp_path):
    architecture = next(a for a in ARCHITECTURES if a.name == name)
    module = architecture_classifier(architecture)
    sequence = split_tasks(images(), batch_size=128)[:2]
    exclude = [f"network.net.{layer}" for layer in architecture.exclude]
    result = run(
        module,
        sequence,
        tmp_path,
        trainer=partial(quiet_trainer, limit_train_batches=1, limit_val_batches=1, limit_test_batches=1),
        partition=PartitionCallback(max_claim=0.3, threshold=0.5, exclude=exclude),
        task_inference="all",
    )
    inference = inference_of(module.ledger)
    assert [known.name for known in inference.tasks] == ["0-1", "2-3"]
    assert {"energy", "plain", "joint"} <= set(inference.strategies)
    assert set(result.strategies) == set(inference.strategies)
    x = next(iter(sequence[0].test_dataloader()))[0][:5]
    for strategy in inference.strategies:
        found = predict_any(module, x, strategy)
        assert bool(found.probabilities.isfinite().all()), strategy


# What tasks and options bring


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"callbacks": [PartitionCallback()]}, "callbacks holds a PartitionCallback"),
        ({"callbacks": [PartitionCallback(after=0.5)]}, "callbacks holds a PartitionCallback"),
        ({"trainer": partial(quiet_trainer, callbacks=[PartitionCallback()])}, "callbacks holds a PartitionCallback"),
        ({"trainer": partial(quiet_trainer, max_steps=0)}, "max_steps=0, so that nothing would train"),
        ({"trainer": partial(quiet_trainer, limit_train_batches=0)}, "limit_train_batches=0, so that nothing would"),
    ],
)
def test_what_would_fail_at_the_seal_is_refused_before_training(options, words, tmp_path):
    module = Net()
    before = weights(module)
    with pytest.raises(ContinualError, match=words):
        run(module, pair(), tmp_path, **options)
    assert all(torch.equal(before[name], value) for name, value in weights(module).items())


class Never(Callback):
    def on_train_start(self, trainer, pl_module):
        raise AssertionError("trained before the error")


def other_validation(name, classes, strange):
    """A task that is judged on another one's data."""
    right, wrong = loaders(*points(classes)), loaders(*points(strange))
    return Task(name, {**right, "val": wrong["val"]}, classes=classes)


@pytest.mark.parametrize("sequence", [[("a", [0, 1], [7, 3])], [("b", [7, 3], [7, 3]), ("a", [4, 5], [0, 1])]])
def test_validation_labels_of_another_task_are_told_before_training(sequence, tmp_path):
    with pytest.raises(ContinualError, match=r"Task 'a' declares classes .* of its judging data holds label"):
        run(Net(), [other_validation(*of) for of in sequence], tmp_path, callbacks=[Never()])


def test_a_later_task_whose_targets_are_no_labels_is_told_before_it_trains_and_not_inferred(tmp_path):
    x, y = points([7, 3])
    later = Task(
        "b",
        loaders(x, F.one_hot(y, 10).float()),
        classes=[7, 3],
        metric=MeanSquaredError(),
        evaluate=lambda module, batch: (module(batch[0])[:, [7, 3]], batch[1][:, [7, 3]]),
    )
    module = Net()
    with pytest.warns(UserWarning, match="Task 'b' will not be inferred: the targets of task 'b' are no labels"):
        run(module, [clouds("a", [0, 1]), later], tmp_path)
    assert [known.name for known in inference_of(module.ledger).tasks] == ["a"]


def test_a_head_of_the_task_before_is_not_trained_on_with_the_next_one():
    module, seen = ContinualModule(Net()), []

    class Sees(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            heads = next(c for c in trainer.callbacks if isinstance(c, TaskInferenceCallback))._heads
            seen.append(float(heads.trained["reconstruction"]["code"].detach().abs().max()))

    sequence = pair()
    for task in sequence:
        module.add_task(task)
    for task in sequence:  # the partition comes at the fit's end, and the next task's start is the seal
        fit(module, task, [*three(after=1.0), TaskInferenceCallback("reconstruction_logits"), Sees()], 2)
    steps = len(seen) // 2
    assert seen[0] == seen[steps] == 0.0  # it begins at zero
    assert seen[steps - 1] > 0.0


def test_two_callbacks_train_one_head():
    found = []
    for count in (1, 2):
        module = Net()
        torch.manual_seed(0)
        fit(module, pair()[0], [*three(), *(TaskInferenceCallback("auto") for _ in range(count))], 2)
        found.append(named_tensors(module))
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


# Strategies of one's own


class Choosy(Strategy):
    """Fails where it is told to."""

    name = "choosy"

    def __init__(self, where, least=0):
        self.where, self.least = where, least

    def fit(self, view, labels, classes, held_out):
        if self.where == "fit" or len(labels) < self.least:
            raise ValueError("cannot be fitted")
        return {"mean": view.logits.mean()}

    def score(self, fitted, view):
        if self.where == "score":
            return view.logits  # one value a sample is asked for
        return view.logits.amax(dim=1) - fitted["mean"]


@pytest.mark.parametrize("where", ["fit", "score"])
def test_a_strategy_that_fails_at_a_seal_is_refused_before_training_and_left_out_where_all_are_tried(
    where, monkeypatch, tmp_path, unchecked
):
    monkeypatch.setitem(STRATEGIES, "choosy", Choosy(where))
    module = Net()
    before = {name: tensor.clone() for name, tensor in named_tensors(module).items()}
    for start in (
        lambda: fit(module, pair()[0], [*three(), TaskInferenceCallback("choosy")], 2),
        lambda: run(module, pair(), tmp_path / where, task_inference="choosy"),
    ):
        with pytest.raises(ContinualError, match=r"task_inference=choosy: it does not work for .*Net with task 'a'"):
            start()
    assert all(torch.equal(tensor, before[name]) for name, tensor in named_tensors(module).items())
    module = Net()
    with pytest.warns(UserWarning, match="task_inference=unchanged: choosy is left out"):
        fit(module, pair()[0], [*three(), TaskInferenceCallback("unchanged")], 2)
    kept = inference_of(state_of(module).ledger)
    assert "choosy" not in kept.strategies
    assert [task.name for task in kept.tasks] == ["a"]


def test_a_strategy_that_needs_more_samples_than_a_batch_is_not_refused(monkeypatch):
    monkeypatch.setitem(STRATEGIES, "choosy", Choosy("nowhere", least=100))
    module = learned(Net(), pair()[:1], "choosy", epochs=2)
    assert [task.name for task in inference_of(module.ledger).tasks] == ["a"]


def test_the_trial_changes_nothing():
    class Draws(Net):
        def __init__(self):
            super().__init__()
            self.norm, self.register_count = nn.BatchNorm1d(32), 0
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.count += 1
            return self.c(F.relu(self.norm(self.b(F.relu(self.a(x)) + 0 * torch.rand(1)))))

    module, task = Draws(), clouds("a", [0, 1])
    state = state_for(module, task)
    state.ledger.reserve("a", [0, 1])
    state.ledger.begin("a", [0, 1])
    tensors = {name: tensor.clone() for name, tensor in named_tensors(module).items()}
    ledger, generator = state.ledger.state_dict(), torch.get_rng_state()
    module.train()
    assert rehearse(module, state, task, TaskInference(tuple(n for n in STRATEGIES if "rotations" not in n))) == ""
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in named_tensors(module).items())
    assert all(torch.equal(owner, ledger["owners"][name]) for name, owner in state.ledger.owners.items())
    assert state.ledger.state_dict()["tasks"] == ledger["tasks"]
    assert state.ledger.inference is None
    assert torch.equal(torch.get_rng_state(), generator)
    assert module.training
    assert all(not child._forward_hooks and not child._forward_pre_hooks for child in module.modules())


def test_a_forward_pass_that_leaves_a_layer_out_is_an_error_that_names_it():
    class Short(Net):
        short = False

        def forward(self, x):
            h = F.relu(self.a(x))
            return self.c(h if self.short else F.relu(self.b(h)))

    module = learned(Short(), pair()[:1], "subspaces", epochs=2)
    module.short = True
    with pytest.raises(ContinualError, match=r"Nothing showed what the layer of 'b\.weight' reads"):
        module.predict(points([0, 1])[0])


def test_batches_of_one_kind_only_are_watched_by_their_size():
    """A batch that cannot be cut, since it is no tensor."""

    class Bag:
        def __init__(self, x, y):
            self.x, self.y = x, y

        def to(self, *args, **options):
            return self

    x, y = points([0, 1])
    data = TensorDataset(x, y)
    loader = DataLoader(data, 16, collate_fn=lambda pairs: Bag(*map(torch.stack, zip(*pairs, strict=True))))

    class Bags(Net):
        def forward(self, x):
            return super().forward(x.x if isinstance(x, Bag) else x)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch), batch.y)

    task = Task(
        "a", {"train": loader, "val": loader}, classes=[0, 1], evaluate=lambda module, bag: (module(bag), bag.y)
    )
    module = learned(Bags(), [task], "subspaces", epochs=2)
    watched = watch_task(module, task, state_of(module), next(iter(loader)))
    assert {"a.weight", "b.weight", "c.weight"} <= watched.weights
    sites = Sites.of(module, state_of(module).structure, module.ledger, "a", watched)
    assert read(module, [sites], partial(module, Bag(x, y))).inputs.shape == (200, INPUTS)
