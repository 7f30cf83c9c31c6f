"""Strategies that keep state over tasks, in projects as people have them: their batches, hooks and inputs."""

import pytest
import torch
from clouds import INPUTS, Net, clouds, learned, loaders, pair, points
from learning import fit, three
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_cf import ContinualError, ContinualModule, ContinualWarning, Task, TaskInferenceCallback
from lightning_cf.learner.inferring import inference_of
from lightning_cf.task_inference import STRATEGIES
from lightning_cf.task_inference.accumulated import Accumulated
from lightning_cf.task_inference.features.by_medium import IMAGES, TOKENS, UNITS, VALUES
from lightning_cf.task_inference.features.units import FirstUnits

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error:.*left out"),  # a strategy that does not work says so and goes
    pytest.mark.filterwarnings("error:.*will not be inferred"),
]

SIZE = 16


class Batches:
    """Batches that are there already, the same in each pass."""

    def __init__(self, batches):
        self.batches = list(batches)

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


class Steps(Net):
    """Its batches are pairs of what it takes and a label."""

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])


def batches(classes, change, count=8, seed=0):
    """Clouds of points in batches, each changed into what a network takes, by its number."""
    x, y = points(classes, count * SIZE, seed=seed)
    parts = zip(x.split(SIZE), y.split(SIZE), strict=True)
    return [(change(rows, labels, number), labels) for number, (rows, labels) in enumerate(parts)]


def task(name, classes, change, **options):
    loader = Batches(batches(classes, change))
    return Task(name, {"train": loader, "val": loader}, classes=classes, **options)


def medium(module):
    return int(inference_of(module.ledger).shared["lda"]["medium"][0])


def told(module, change, classes=(7, 3), strategy="lda"):
    """Of how many new samples of the second task the strategy says so."""
    seen = [module.predict(x, strategy=strategy).tasks for x, _ in batches(list(classes), change, 4, seed=5)]
    return float((torch.cat(seen) == 1).float().mean())


class Longer(Steps):
    """Series, whose length varies from batch to batch."""

    change = staticmethod(lambda x, y, n: x[:, None].repeat(1, 3 + n % 4, 1))

    def forward(self, x):
        return super().forward(x.mean(1))


class Tokens(Steps):
    """Tokens in rows that are as long as the longest of a batch."""

    change = staticmethod(lambda x, y, n: 4 * y[:, None] + torch.arange(SIZE * (5 + n % 4)).reshape(SIZE, -1) % 4)

    def __init__(self):
        super().__init__()
        self.e = nn.Embedding(40, INPUTS)

    def forward(self, x):
        return super().forward(self.e(x).mean(1))


class Images(Steps):
    """Images whose size varies from batch to batch."""

    change = staticmethod(
        lambda x, y, n: torch.sin(torch.arange(8.0 + n % 4) * y[:, None])[:, None, None].repeat(1, 1, 9, 1)
    )

    def __init__(self):
        super().__init__()
        self.k = nn.Conv2d(1, INPUTS, 3)

    def forward(self, x):
        return super().forward(F.relu(self.k(x)).mean((2, 3)))


class Complex(Steps):
    """Complex numbers."""

    change = staticmethod(lambda x, y, n: torch.view_as_complex(x.reshape(len(x), -1, 2).contiguous()))

    def forward(self, x):
        return super().forward(torch.view_as_real(x).flatten(1))


class OneNumber(Steps):
    """One number a sample, without an axis of its own."""

    change = staticmethod(lambda x, y, n: y + 0.01 * x[:, 0])

    def forward(self, x):
        return super().forward(x[:, None] * torch.ones(INPUTS))


class Missing(Steps):
    """A value is missing in every sample, which the network fills in."""

    change = staticmethod(lambda x, y, n: x.index_fill(1, torch.tensor([n % INPUTS]), torch.nan))

    def forward(self, x):
        return super().forward(x.nan_to_num(0.0))


class Box:
    """What is no tensor."""

    def __init__(self, x):
        self.x = x

    def to(self, *args, **options):
        return Box(self.x.to(*args, **options))


class Boxed(Steps):
    change = staticmethod(lambda x, y, n: Box(x))

    def forward(self, x):
        return super().forward(x.x)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Longer, VALUES),
        (Tokens, TOKENS),
        (Images, IMAGES),
        (Complex, VALUES),
        (OneNumber, VALUES),
        (Missing, VALUES),
        (Boxed, UNITS),
    ],
)
def test_inputs_of_any_kind_have_features(kind, expected):
    module = learned(kind(), [task("a", [0, 1], kind.change), task("b", [7, 3], kind.change)], epochs=3)
    assert "lda" in inference_of(module.ledger).strategies
    assert medium(module) == expected
    assert told(module, kind.change) > 0.8


def test_lengths_beside_a_series_are_an_input_too():
    class Two(Net):
        def forward(self, x, lengths):
            return super().forward(x.sum(1) / lengths[:, None])

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(*batch[0]), batch[1])

    change = lambda x, y, n: (x[:, None].repeat(1, 3, 1), torch.full((len(x),), 3))  # noqa: E731
    evaluate = lambda module, batch: (module(*batch[0]), batch[1])  # noqa: E731
    sequence = [task(name, classes, change, evaluate=evaluate) for name, classes in (("a", [0, 1]), ("b", [7, 3]))]
    module = learned(Two(), sequence, epochs=3)
    assert medium(module) == VALUES
    assert told(module, change) > 0.8


def test_what_hooks_prepare_is_seen_as_predictions_see_it():
    class Prepares(Steps):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return (batch[0] - 100) / 10, batch[1]

    raw = lambda x, y, n: 10 * x + 100  # noqa: E731
    module = learned(Prepares(), [task("a", [0, 1], raw), task("b", [7, 3], raw)], epochs=3)
    assert told(module, lambda x, y, n: x) > 0.8  # as forward takes it


def dictionaries(name, classes, evaluate):
    x, y = points(classes)
    loader = DataLoader([{"values": a, "label": b} for a, b in zip(x, y, strict=True)], SIZE)
    return Task(name, {"train": loader, "val": loader}, classes=classes, evaluate=evaluate)


class Dictionaries(Net):
    def forward(self, batch):
        return super().forward(batch["values"])

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch), batch["label"])


def test_no_feature_is_made_of_labels_that_forward_gets_too():
    evaluate = lambda module, batch: (module(batch), batch["label"])  # noqa: E731
    sequence = [dictionaries("a", [0, 1], evaluate), dictionaries("b", [7, 3], evaluate)]
    module = learned(Dictionaries(), sequence, epochs=3)
    assert medium(module) == VALUES
    x, y = points([7, 3], seed=5)
    found = module.predict({"values": x}, strategy="lda")
    assert float((found.tasks == 1).float().mean()) > 0.8
    other = module.predict({"values": x, "label": torch.zeros_like(y)}, strategy="lda")
    assert torch.equal(other.probabilities, found.probabilities)


class WithLabels(Net):
    """Its forward pass gives a loss and scores, as published modules have it."""

    def forward(self, x, y=None):
        scores = super().forward(x)
        labels = None if y is None else y.argmax(1) if y.shape[1:] == (10,) else y.flatten().long()
        return None if y is None else F.cross_entropy(scores, labels), scores

    def training_step(self, batch, batch_idx):
        return self(*batch)[0]


FORMS = {
    "one-hot": (lambda y: F.one_hot(y, 10).float(), lambda y: y.argmax(1)),
    "a column of floats": (lambda y: y.float()[:, None], lambda y: y.squeeze(1).long()),
    "other whole numbers": (lambda y: y.int(), lambda y: y.long()),
}


@pytest.mark.parametrize("form", FORMS)
def test_labels_that_forward_gets_in_another_form_are_no_features(form):
    given, label = FORMS[form]
    evaluate = lambda module, batch: (module(*batch)[1], label(batch[1]))  # noqa: E731
    rows = {name: points(classes) for name, classes in (("a", [0, 1]), ("b", [7, 3]))}
    sequence = [
        Task(name, loaders(x, given(y)), classes=y.unique().tolist(), evaluate=evaluate)
        for name, (x, y) in rows.items()
    ]
    module = learned(WithLabels(), sequence, epochs=3)
    assert medium(module) == VALUES
    x, y = points([7, 3], seed=5)
    found = module.predict((x, given(y)), strategy="lda")
    assert torch.equal(module.predict((x, given(0 * y)), strategy="lda").probabilities, found.probabilities)
    assert torch.equal(module.predict(x, strategy="lda").classes, found.classes)


def test_several_inputs_that_outputs_hang_on_are_features():
    class Two(Net):
        def forward(self, x, more):
            return super().forward(x + more)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(*batch[:2]), batch[2])

    def of(name, classes):
        x, y = points(classes)
        loader = DataLoader(list(zip(x / 2, x / 2, y, strict=True)), SIZE)
        evaluate = lambda module, batch: (module(*batch[:2]), batch[2])  # noqa: E731
        return Task(name, {"train": loader, "val": loader}, classes=classes, evaluate=evaluate)

    module = learned(Two(), [of("a", [0, 1]), of("b", [7, 3])], epochs=3)
    assert medium(module) == VALUES
    with pytest.raises(ContinualError, match=r"missing a required argument: 'more'.*predict\(\(x, y\)\)"):
        module.predict(points([0, 1])[0])


def test_an_input_that_no_output_hangs_on_takes_no_other_from_the_features():
    class Unread(Net):
        def forward(self, number, x):
            return super().forward(x)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(*batch[:2]), batch[2])

    def of(name, classes):
        x, y = points(classes)
        loader = DataLoader(list(zip(torch.arange(len(x)), x, y, strict=True)), SIZE)
        evaluate = lambda module, batch: (module(*batch[:2]), batch[2])  # noqa: E731
        return Task(name, {"train": loader, "val": loader}, classes=classes, evaluate=evaluate)

    module = learned(Unread(), [of("a", [0, 1]), of("b", [7, 3])], epochs=3)
    assert medium(module) == VALUES
    x = points([7, 3], seed=5)[0]
    found = [module.predict((numbers, x), strategy="lda") for numbers in (torch.arange(len(x)), torch.zeros(len(x)))]
    assert torch.equal(found[0].probabilities, found[1].probabilities)
    assert float((found[0].tasks == 1).float().mean()) > 0.8


def test_the_input_is_what_forward_is_given_out_of_a_dictionary():
    class Values(Net):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch["values"]), batch["label"])

    evaluate = lambda module, batch: (module(x=batch["values"]), batch["label"])  # noqa: E731
    sequence = [dictionaries("a", [0, 1], evaluate), dictionaries("b", [7, 3], evaluate)]
    module = learned(Values(), sequence, epochs=3)
    assert medium(module) == VALUES
    assert told(module, lambda x, y, n: x) > 0.8


@pytest.mark.parametrize("strategy", ["lda", "ridge"])
def test_a_class_without_a_sample_is_never_likely(strategy):
    a, b = clouds("a", [0, 1]), Task("b", loaders(*points([7, 3])), classes=[7, 3, 5])
    module = learned(Net(), [a, b], strategy, epochs=2)
    inference = inference_of(module.ledger)
    x = points([0, 1], seed=5)[0]
    scores = inference.infer(inference.read(module, module, x)).scores
    assert float(scores.softmax(1)[:, 1].max()) < 0.1  # not what the first class of the first task has


@pytest.mark.parametrize("strategy", ["lda", "ridge"])
def test_tasks_of_one_class(strategy):
    module = ContinualModule(Net())
    sequence = [clouds("a", [0]), clouds("b", [7])]
    for each in sequence:
        module.add_task(each)
    for number, (each, label) in enumerate(zip(sequence, (0, 7), strict=True)):
        fit(module, each, [*three(max_claim=0.3), TaskInferenceCallback(strategy)], 2)
        assert float((module.predict(points([label], seed=5)[0]).tasks == number).float().mean()) > 0.8


def test_how_familiar_an_input_is_decides_alone_whether_it_is_none():
    """Not which of the tasks it is likest to: what calibrates each of them is their own."""
    module = learned(Net(), pair(), "lda", epochs=2)
    inference = inference_of(module.ledger)
    for known, threshold in zip(inference.tasks, (-4.0, -9.0), strict=True):
        known.calibration["lda"] = torch.tensor([0.0, 1.0 - threshold / 9, threshold])
    x = torch.cat([points([0, 1, 7, 3], seed=5)[0], 4 * points([5, 6], seed=6)[0]])
    readout = inference.read(module, module, x)
    columns = torch.cat([known.sites.outputs for known in inference.tasks])
    shared, strategy = inference.shared["lda"], STRATEGIES["lda"]
    outputs = strategy.outputs(shared, readout, inference.tasks[0].sites, columns)
    familiar = strategy.familiarity(shared, outputs, columns)
    none = inference.infer(readout).probabilities[:, -1].double()
    expected = ((-6.5 - familiar.double()) / 1.722).sigmoid()  # threshold and spread are averaged
    torch.testing.assert_close(none, expected, rtol=1e-2, atol=1e-12)
    assert float(none.min()) < 0.05  # 0.0098 to 0.0109 over four seeds
    assert float(none.max()) > 0.95


@pytest.mark.parametrize("strategy", ["auto", "lda", "subspaces"])
def test_no_samples_and_one_are_a_batch(strategy):
    module, (x, _) = learned(Net(), pair(), strategy, epochs=2), points([7, 3])
    assert module.predict(x[:0]).probabilities.shape == (0, 11)
    torch.testing.assert_close(module.predict(x[:1]).scores, module.predict(x).scores[:1], rtol=1e-3, atol=1e-3)


def test_a_strategy_that_fails_on_later_data_is_left_out_where_there_are_others():
    """The trial sees one batch; only a pass over all of them shows that one is longer."""
    short, longer = (lambda x, y, n, k=k: x[:, None].repeat(1, 3 + (n > k), 1) for k in (99, 3))
    sequence = [task("a", [0, 1], short), task("b", [7, 3], longer)]
    module = ContinualModule(Longer())
    for each in sequence:
        module.add_task(each)
    fit(module, sequence[0], [*three(), TaskInferenceCallback("auto")], 2)
    others = [name for name in inference_of(module.ledger).strategies if name != "lda"]
    with pytest.warns(ContinualWarning, match="lda is left out from here on"):
        fit(module, sequence[1], [*three(), TaskInferenceCallback("auto")], 2)
    inference = inference_of(module.ledger)
    assert list(inference.strategies) == others
    assert [known.name for known in inference.tasks] == ["a", "b"]
    assert module.predict(torch.rand(3, 4, INPUTS)).tasks.shape == (3,)


def test_a_strategy_that_was_wanted_by_name_is_not_left_out():
    short, longer = (lambda x, y, n, k=k: x[:, None].repeat(1, 3 + (n > k), 1) for k in (99, 3))
    with pytest.raises((ContinualError, RuntimeError)):
        learned(Longer(), [task("a", [0, 1], short), task("b", [7, 3], longer)], "lda", epochs=2)


def test_sums_are_exact_within_a_context_of_half_precision():
    kept = []
    for enabled in (False, True):
        module, each = ContinualModule(Net()), clouds("a", [0, 1])
        module.add_task(each)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            fit(module, each, [*three(), TaskInferenceCallback("lda")], 1)
        kept.append(inference_of(module.ledger).shared["lda"])
    for name in ("sums.gram", "sums.totals", "sums.counts", "features.centre"):
        assert torch.equal(kept[0][name], kept[1][name]), name
    assert {x.dtype for n, x in kept[1].items() if not n.startswith("familiar.")} <= {torch.float32, torch.int64}


def test_units_that_a_first_task_owns_may_be_all_that_is_seen(monkeypatch):
    monkeypatch.setitem(STRATEGIES, "units", Accumulated("units", features=FirstUnits()))
    module = learned(Longer(), [task(n, c, Longer.change) for n, c in (("a", [0, 1]), ("b", [7, 3]))], "units", 3)
    assert told(module, Longer.change, strategy="units") > 0.8
    assert module.predict(torch.rand(3, 1, INPUTS)).tasks.shape == (3,)  # shorter than the grid has cells
