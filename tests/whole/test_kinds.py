"""Tasks of different kinds in one network: classes, numbers, pixels, text; each with a loss and metric of its own."""

from functools import partial

import pytest
import torch
from learning import classifier, fit, images, judged, predictions, quiet_trainer, tasks, three
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import JaccardIndex, MeanSquaredError
from torchmetrics.classification import BinaryAccuracy, MultilabelF1Score

from lightning_cf import (
    Classifier,
    ContinualError,
    ContinualModule,
    MaskedGradientCallback,
    PartitionCallback,
    SequentialTaskRunner,
    StructureError,
    StructureWarning,
    Task,
)
from lightning_cf.learner.keeping import state_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no claim within the budget"),
]


def loaders(target, classes=range(10)):
    """Images of some classes with a target computed from image and label."""
    chosen = images().map(lambda part: part.of_classes(list(classes)))
    parts = {"train": chosen.train, "val": chosen.val, "test": chosen.test}
    return {
        stage: DataLoader(TensorDataset(part.images, target(part.images, part.labels)), 32, shuffle=stage == "train")
        for stage, part in parts.items()
    }


COLUMNS = {"classes": [0, 1], "mean": [2, 3], "halves": [4, 5, 6]}


class ManyKinds(LightningModule):
    """One body; the loss follows from the task: its name tells columns and kind."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU())
        self.head = nn.Linear(96, 7)

    def forward(self, x):
        return self.head(self.net(x))

    def training_step(self, batch, batch_idx):
        x, y = batch
        name = self.trainer.datamodule.name
        outputs = self(x)[:, COLUMNS[name]]
        if name == "classes":
            return F.cross_entropy(outputs, y)
        if name == "mean":
            return F.mse_loss(outputs, y)
        return F.binary_cross_entropy_with_logits(outputs, y.float())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.003, weight_decay=0.01)


def column_reader(columns, change=lambda outputs: outputs):
    def evaluate(module, batch):
        x, y = batch
        return change(module(x)[:, columns]), y

    return evaluate


def halves(x, y):
    """Three labels that do not exclude one another."""
    ink = x.flatten(2).squeeze(1).reshape(-1, 8, 8)
    return torch.stack([ink[:, :4].sum((1, 2)) > 10, ink[:, :, :4].sum((1, 2)) > 9.6, y % 2 == 0], dim=1).long()


def many_kinds():
    return [
        Task("classes", loaders(lambda x, y: y, (0, 1)), outputs=COLUMNS["classes"], evaluate=column_reader([0, 1])),
        Task(
            "mean",
            loaders(lambda x, y: torch.stack([x.mean((1, 2, 3)), x[:, 0, :4].mean((1, 2))], dim=1)),
            outputs=COLUMNS["mean"],
            metric=MeanSquaredError(),
            evaluate=column_reader([2, 3]),
        ),
        Task(
            "halves",
            loaders(halves),
            outputs=COLUMNS["halves"],
            metric=MultilabelF1Score(3),
            evaluate=column_reader([4, 5, 6], torch.sigmoid),
        ),
    ]


def test_classification_regression_and_many_labels_follow_one_another(tmp_path):
    torch.manual_seed(0)
    module, sequence = ManyKinds(), many_kinds()
    result = SequentialTaskRunner(
        module,
        sequence,
        trainer=quiet_trainer,
        epochs=12,
        invariance_epochs=8,
        partition=PartitionCallback(tolerance=0.01),
        masking=MaskedGradientCallback(mask_outputs=False),
        root=tmp_path,
    ).run()
    matrix, initial = result.accuracy.matrix, result.accuracy.initial
    for task in range(3):
        assert bool((matrix[task:, task] == matrix[task, task]).all())
    assert matrix[2, 0] > 0.97
    # The score of a metric of which less is better is its negative.
    spread = torch.cat([y for _, y in sequence[1].test_dataloader()]).var(dim=0).mean()
    assert -matrix[2, 1] < 0.3 * float(spread) < -float(initial[1])
    assert matrix[2, 2] > 0.9 > float(initial[2])
    assert result.constant_predictor == [None] * 3
    owners = {int(owner) for owners in state_of(module).ledger.owners.values() for owner in owners}
    assert owners == {-1, 0, 1, 2}


class Yes(LightningModule):
    """One output a task says which of two classes it is."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU())
        self.head = nn.Linear(32, 2)

    def forward(self, x):
        return self.head(self.net(x))

    def training_step(self, batch, batch_idx):
        x, y = batch
        (column,) = self.trainer.datamodule.outputs
        return F.binary_cross_entropy_with_logits(self(x)[:, column], y.float())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.005)


def test_one_output_tells_two_classes_apart(tmp_path):
    torch.manual_seed(0)
    sequence = [
        Task(
            name,
            loaders(lambda x, y, second=second: (y == second).long(), (second - 1, second)),
            outputs=[number],
            metric=BinaryAccuracy(),
            evaluate=column_reader(number, torch.sigmoid),
        )
        for number, (name, second) in enumerate((("a", 1), ("b", 3)))
    ]
    result = SequentialTaskRunner(
        Yes(),
        sequence,
        trainer=quiet_trainer,
        epochs=4,
        invariance_epochs=2,
        masking=MaskedGradientCallback(mask_outputs=False),
        root=tmp_path,
    ).run()
    assert result.accuracy.forgetting == 0.0
    assert float(result.accuracy.matrix[-1].min()) > 0.85


class Pixels(LightningModule):
    """A class for every pixel."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1), nn.ReLU()
        )
        self.head = nn.Conv2d(24, 4, 1)

    def forward(self, x):
        return self.head(self.net(x))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def ink(x, y):
    return (x[:, 0] > 0.5).long()


def edge(x, y):
    """Ink above a pixel without."""
    dark = x[:, 0] > 0.5
    return 2 + (dark & ~F.pad(dark[:, 1:], (0, 0, 0, 1))).long()


def test_segmentation_with_classes_of_its_own_for_each_task(tmp_path):
    torch.manual_seed(0)
    sequence = [
        Task(name, loaders(target), classes=classes, metric=JaccardIndex(task="multiclass", num_classes=4))
        for name, target, classes in (("ink", ink, [0, 1]), ("edge", edge, [2, 3]))
    ]
    for task in sequence:
        task.metric.average = "weighted"  # classes that a task does not have count nothing
    result = SequentialTaskRunner(
        Pixels(), sequence, trainer=quiet_trainer, epochs=4, invariance_epochs=3, root=tmp_path
    ).run()
    assert result.accuracy.forgetting == 0.0
    assert float(result.accuracy.matrix[-1].min()) > 0.9
    assert max(result.constant_predictor) < 0.85


# Text


TEXTS = [
    "the cat sat on the mat and the dog sat on the log while the rain fell on the roof of the old red house " * 6,
    "ONE FINE DAY FIVE WIDE GEESE WALKED ALONG A LANE, AND NOBODY KNEW WHICH WAY THEY HAD COME OR WOULD GO. " * 6,
]
CHARACTERS = [sorted(set(text)) for text in TEXTS]
LENGTH = 16


class Writer(LightningModule):
    """A causal Transformer that predicts the next character."""

    def __init__(self, vocabulary, width=48):
        super().__init__()
        self.embed, self.position = nn.Embedding(vocabulary, width), nn.Parameter(0.1 * torch.randn(LENGTH, width))
        layer = nn.TransformerEncoderLayer(width, 6, 96, 0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH), persistent=False)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x) + self.position, mask=self.mask, is_causal=True))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x).flatten(0, 1), y.flatten())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.005)


def characters(number):
    """Windows of a text, each with what follows; the two languages share no number, not even for the space."""
    first = sum(map(len, CHARACTERS[:number]))
    codes = torch.tensor([first + CHARACTERS[number].index(character) for character in TEXTS[number]])
    windows = codes.unfold(0, LENGTH + 1, 1)
    data = TensorDataset(windows[:, :-1], windows[:, 1:])
    loader = {"train": DataLoader(data, 32, shuffle=True), "val": DataLoader(data, 64)}
    return Task(f"language {number}", loader, classes=list(range(first, first + len(CHARACTERS[number]))))


def test_next_token_prediction_on_two_languages():
    torch.manual_seed(0)
    module, sequence = Writer(sum(map(len, CHARACTERS))), [characters(0), characters(1)]
    scores, logits = [], []
    for task in sequence:
        fit(module, task, three(max_claim=0.5), epochs=8)
        scores.append(judged(module, task))
        logits.append(predictions(module, task))
    assert torch.equal(predictions(module, sequence[0]), logits[0])
    assert judged(module, sequence[0]) == scores[0]
    most = max(TEXTS[0].count(c) / len(TEXTS[0]) for c in CHARACTERS[0])
    assert min(scores) > 0.85 > 0.3 > most


# A head and a loss for each task


class Heads(LightningModule):
    """A body and heads by the task's name, each with a loss of its own; forward gives the body's features."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU())
        self.heads = nn.ModuleDict({"digit": nn.Linear(48, 3), "ink": nn.Linear(48, 2), "size": nn.Linear(48, 1)})

    def forward(self, x):
        return self.body(x)

    def predict_as(self, name, x):
        return self.heads[name](self(x))

    def training_step(self, batch, batch_idx):
        x, y = batch
        name = self.trainer.datamodule.name
        out = self.predict_as(name, x)
        if name == "digit":
            return F.cross_entropy(out, y)
        return F.binary_cross_entropy_with_logits(out, y) if name == "ink" else F.mse_loss(out, y)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.003)


def own_head(name, change=lambda outputs: outputs):
    return lambda module, batch: (change(module.predict_as(name, batch[0])), batch[1])


def heads():
    thirds = loaders(lambda x, y: y, (0, 1, 2))
    ink = loaders(lambda x, y: torch.stack([x[:, 0, :4].mean((1, 2)) > 0.32, x.mean((1, 2, 3)) > 0.31], 1).float())
    return [
        Task("digit", thirds, evaluate=own_head("digit")),
        Task("ink", ink, evaluate=own_head("ink", torch.sigmoid), metric=MultilabelF1Score(2)),
        Task(
            "size",
            loaders(lambda x, y: x.mean((1, 2, 3))[:, None]),
            evaluate=own_head("size"),
            metric=MeanSquaredError(),
        ),
    ]


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda module: module, id="plain"),
        pytest.param(ContinualModule, id="wrapped", marks=pytest.mark.slow),
    ],
)
def test_heads_of_their_own_are_met_as_the_tasks_come(wrap):
    torch.manual_seed(0)
    module, sequence = wrap(Heads()), heads()
    scores, outputs = [], []
    for task in sequence:
        fit(module, task, three(tolerance=0.02), epochs=12)
        scores.append(judged(module, task))
        outputs.append(predictions(module, task))
    ledger = state_of(module).ledger
    assert ledger.reserved == {"digit": [0, 1, 2], "ink": [3, 4], "size": [5]}
    assert set(ledger.owners) == {"body.1", "body.3"}
    for task, score, before in zip(sequence, scores, outputs, strict=True):
        assert torch.equal(predictions(module, task), before)
        assert judged(module, task) == score
    spread = torch.cat([y for _, y in sequence[2].judging_batches()]).var()
    assert scores[0] > 0.95
    assert scores[1] > 0.85
    assert scores[2] < 0.3 * float(spread)


def test_another_process_meets_the_earlier_heads_again(tmp_path):
    torch.manual_seed(0)
    module, (digit, ink, _) = ContinualModule(Heads()), heads()
    keep = ModelCheckpoint(dirpath=tmp_path, filename="two")
    for task in (digit, ink):
        fit(module, task, [*three(tolerance=0.02), keep], epochs=4, enable_checkpointing=True)
    before = predictions(module, digit)
    path = max(tmp_path.glob("two*.ckpt"), key=lambda path: path.stat().st_mtime)
    other = type(module).load_from_checkpoint(path, weights_only=True)
    with pytest.raises(ContinualError, match=r"'heads\.size', but .* 'heads\.digit' as the first one\. .*add_task"):
        fit(other, heads()[2], three(tolerance=0.02), epochs=2)
    other = type(module).load_from_checkpoint(path, weights_only=True)
    for task in heads()[:2]:
        other.add_task(task)
    fit(other, heads()[2], three(tolerance=0.02), epochs=4)
    assert state_of(other).ledger.reserved == {"digit": [0, 1, 2], "ink": [3, 4], "size": [5]}
    assert torch.equal(predictions(other, digit), before)


@pytest.mark.slow
def test_a_runner_knows_all_heads_from_the_start(tmp_path):
    torch.manual_seed(0)
    module = Heads()
    result = SequentialTaskRunner(
        module,
        heads(),
        trainer=quiet_trainer,
        epochs=6,
        invariance_epochs=4,
        partition=PartitionCallback(tolerance=0.02),
        root=tmp_path,
    ).run()
    assert result.accuracy.forgetting == 0.0
    assert state_of(module).ledger.reserved == {"digit": [0, 1, 2], "ink": [3, 4], "size": [5]}


# The same numbers in another domain


class Autoencoder(LightningModule):
    """As in many a tutorial: forward is the encoder, the loss compares all pixels."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 24))
        self.decoder = nn.Sequential(nn.ReLU(), nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 64))

    def forward(self, x):
        return self.encoder(x)

    def training_step(self, batch, batch_idx):
        x = batch[0].flatten(1)
        return F.mse_loss(self.decoder(self.encoder(x)), x)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.003)


def rebuilt(module, batch):
    x = batch[0].flatten(1)
    return module.decoder(module.encoder(x)), x


def domain(name, classes):
    return Task(name, loaders(lambda x, y: y, classes), evaluate=rebuilt, metric=MeanSquaredError())


def test_outputs_of_the_same_numbers_in_another_domain_are_added():
    torch.manual_seed(0)
    module, sequence = ContinualModule(Autoencoder()), [domain("low", (0, 1, 2)), domain("high", (7, 8, 9))]
    scores = []
    for task in sequence:
        fit(module, task, three(tolerance=0.002, max_claim=0.5), epochs=24)
        scores.append(judged(module, task))
    assert module.decoder[-1].out_features == 128
    assert judged(module, sequence[0]) == pytest.approx(scores[0], rel=1e-5)
    for task, score in zip(sequence, scores, strict=True):
        pixels = torch.cat([x.flatten(1) for x, _ in task.judging_batches()])
        assert score < 0.6 * float(pixels.var(dim=0).mean())


def test_without_the_wrapper_the_way_out_is_named():
    module = Autoencoder()
    fit(module, domain("low", (0, 1, 2)), three(), epochs=2)
    with pytest.raises(ContinualError, match=r"both have output 0\. .* ContinualModule"):
        fit(module, domain("high", (7, 8, 9)), three(), epochs=2)


# What cannot be scored is known before training


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [
        (lambda module, batch: (module(batch[0]), batch[1][:3]), r"predictions \[\d+, 10\] and targets \[3\]"),
        (
            lambda module, batch: module.nothing(batch),
            "cannot run on its first batch: 'Classifier' object has no attribute 'nothing'",
        ),
    ],
)
def test_a_task_that_cannot_be_scored_is_refused_before_training(evaluate, message):
    module = classifier()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    task = Task("odd", loaders(lambda x, y: y, (0, 1)), classes=[0, 1], evaluate=evaluate)
    with pytest.raises(ContinualError, match=message):
        fit(module, task, three(), epochs=2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


class Switching(Heads):
    """Its forward pass follows what task is current."""

    current = "digit"

    def forward(self, x):
        return self.heads[self.current](self.body(x))

    def predict_as(self, name, x):
        return self(x)


def test_a_forward_pass_that_switches_heads_is_refused_with_the_way_out():
    module, (digit, ink, _) = Switching(), heads()
    fit(module, digit, three(tolerance=0.02), epochs=2)
    module.current = "ink"
    with pytest.raises(ContinualError, match=r"tasks run Switching is another one now\. .* name its own.*heads"):
        fit(module, ink, three(tolerance=0.02), epochs=2)


def test_columns_of_regression_need_not_be_contiguous():
    module = classifier()
    task = Task(
        "two means",
        loaders(lambda x, y: torch.stack([x.mean((1, 2, 3)), x[:, 0, :4].mean((1, 2))], dim=1)),
        outputs=[2, 3],
        metric=MeanSquaredError(),
        evaluate=lambda module, batch: (module(batch[0])[:, 2:4], batch[1]),
    )
    module.training_step = lambda batch, batch_idx: F.mse_loss(module(batch[0])[:, 2:4], batch[1])
    fit(module, task, three(), epochs=4)
    assert state_of(module).ledger.tasks[0].outputs == [2, 3]


# What meets nothing, or is held


class Projecting(Heads):
    """Trains a projection that nothing which is scored runs, and scales its outputs by a number."""

    def __init__(self):
        super().__init__()
        self.projection, self.scale = nn.Linear(48, 8), nn.Parameter(torch.tensor(1.0))

    def predict_as(self, name, x):
        return self.heads[name](self(x)) * self.scale

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + 0.01 * self.projection(self(batch[0])).square().mean()


@pytest.mark.filterwarnings("default:.*stay as the first task left them")
def test_what_later_tasks_cannot_train_is_named():
    module, (digit, ink, _) = Projecting(), heads()
    fit(module, digit, three(tolerance=0.02), epochs=2)
    with pytest.warns(StructureWarning, match=r"^'projection.weight', 'projection.bias' stay as .* training reaches"):
        fit(module, ink, three(tolerance=0.02), epochs=2)


@pytest.mark.parametrize("options", [{}, {"reinitialise": False}])
def test_weights_that_the_user_holds_stay_theirs(options):
    torch.manual_seed(0)
    module = Heads()
    module.body[1].requires_grad_(False)
    before = module.body[1].weight.clone(), module.body[1].bias.clone()
    for task in heads()[:2]:
        fit(module, task, three(tolerance=0.02, **options), epochs=4)
        assert torch.equal(module.body[1].weight, before[0])
        assert torch.equal(module.body[1].bias, before[1])
    ledger = state_of(module).ledger
    assert ledger.whole == ["body.1"]
    assert 0 < float((ledger.owners["body.3"] == -1).float().mean()) < 1


@pytest.mark.parametrize(
    "loss", [lambda x, y: F.cross_entropy(x, y, label_smoothing=0.1), lambda x, y: x.square().mean()]
)
def test_a_loss_that_masked_outputs_make_infinite_is_refused_at_the_first_batch(loss):
    module = classifier()
    module.training_step = lambda batch, batch_idx: loss(module(batch[0]), batch[1])
    with pytest.raises(ContinualError, match=r"loss of the first batch is infinite.*mask_outputs=False"):
        fit(module, tasks()[0], three(), epochs=2)
    fit(module, tasks()[0], [*three()[:2], MaskedGradientCallback(mask_outputs=False)], epochs=2)


class Scaled(nn.Module):
    """Outputs that are made from several columns each."""

    def __init__(self, mix):
        super().__init__()
        self.first, self.head, self.mix = nn.Linear(64, 32), nn.Linear(32, 10), mix

    def forward(self, x):
        return self.mix(self.head(F.relu(self.first(x.flatten(1)))))


def scaled(mix):
    torch.manual_seed(0)
    return Classifier(Scaled(mix), optimizer=partial(torch.optim.Adam, lr=0.003), cosine=False)


@pytest.mark.parametrize("mask_outputs", [True, False])
@pytest.mark.parametrize("isolation", ["exact", "perturb"])
def test_outputs_made_from_several_columns_work_under_perturb_alone_and_without_masks(isolation, mask_outputs):
    module = scaled(lambda z: 8 * F.normalize(z, dim=1))
    callbacks = [*three(isolation=isolation)[:2], MaskedGradientCallback(mask_outputs=mask_outputs)]
    if isolation == "perturb" and not mask_outputs:
        fit(module, tasks()[0], callbacks, epochs=8)
        assert judged(module, tasks()[0]) > 0.9
        return
    message = (
        r"mix the columns of 'network\.head'; 'aten\.mul' in module 'network' gives them.*"
        r"Or use isolation='perturb' with MaskedGradientCallback\(mask_outputs=False\)"
    )
    with pytest.raises(StructureError, match=message):
        fit(module, tasks()[0], callbacks)


def test_outputs_of_which_no_column_is_left_are_refused_under_both_isolations():
    for isolation in ("exact", "perturb"):
        with pytest.raises(StructureError, match=r"'aten\.mean'.*Neither isolation='perturb' nor exclude= helps"):
            fit(scaled(lambda z: z.mean(1, keepdim=True)), tasks()[0], three(isolation=isolation))
