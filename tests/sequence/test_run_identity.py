"""What is the same run: every difference by its name, and the same script run twice never differs."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from learning import quiet_trainer
from lightning.pytorch.callbacks import EarlyStopping
from runs import Net, data, net, pair, run_of
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, TensorDataset, WeightedRandomSampler, random_split
from torchmetrics.classification import MulticlassF1Score

from lightning_cf import ContinualError, InvarianceCallback, PartitionCallback, RunWarning, SequentialTaskRunner, Task
from lightning_cf.sequence.comparison import VARIABLE, differences
from lightning_cf.utilities.content import content_sha256
from lightning_cf.utilities.describing import describe

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*no claim within the budget", "ignore:You passed in a `val_dataloader`"
)


class Scale:
    """A perturbation without a text of its own."""

    def __init__(self, factor):
        self.amount = factor

    def __call__(self, vectors, generator):
        return vectors * self.amount


@dataclass
class Shift:
    by: float
    how: object = None

    def __call__(self, vectors, generator):
        return vectors + self.by


class Other(Net):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Gelu(Net):
    def forward(self, x):
        return self.head(nn.functional.gelu(self.body[0](x)))


class Relu(Net):
    def forward(self, x):
        return self.head(nn.functional.relu(self.body[0](x)))


Gelu.__name__ = Gelu.__qualname__ = Relu.__name__ = Relu.__qualname__ = "Plain"


def first_score(module, batch):
    return module(batch[0]), batch[1]


def second_score(module, batch):
    return module(batch[0]) * 2, batch[1]


def one_named(**methods):
    """Classes of one name, whose training asks a helper."""

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.helper(batch), batch[1])

    methods = {"helper": lambda self, batch: self(batch[0]), **methods}
    return type("Plain", (Net,), {"training_step": training_step, **methods})


def held():
    module = net()
    module.body[0].weight.requires_grad_(False)
    return module


def doubled(samples):
    return torch.stack([x for x, _ in samples]) * 2, torch.stack([y for _, y in samples])


def drawn(batch_size=20, other=None, **options):
    """A task whose loader draws in some way."""
    x, y = next(iter(DataLoader(pair()[0].data.train_dataloader().dataset, 40)))
    if other is not None:
        y[other] = 1 - y[other]
    given = {"batch_size": batch_size} if batch_size else {}
    return [Task("a", {"train": DataLoader(TensorDataset(x, y), **given, **options), "val": [(x, y)]}, classes=[0, 1])]


def perturbed(perturbation):
    return {"isolation": "perturb", "invariance": InvarianceCallback(perturbation=perturbation)}


def made(**options):
    """Options of a run, made anew at each start, as a script does."""
    return {name: make() for name, make in options.items()}


BASE = {"module": net, "sequence": lambda: pair()[:1]}

CHANGES = {
    "order": ({"sequence": pair}, {"sequence": lambda: pair()[::-1]}, ["order=['a', 'b'], not ['b', 'a']"]),
    "activation": ({}, {"module": partial(net, activation=nn.Tanh)}, ["architecture.body.1='ReLU()', not 'Tanh()'"]),
    "functional activation": (
        {"module": partial(net, kind=Relu)},
        {"module": partial(net, kind=Gelu)},
        ["code.Plain.forward.code"],
    ),
    "width": ({}, {"module": partial(net, hidden=9)}, ["parameters.body.0.weight="]),
    "optimizer": (
        {},
        {"module": partial(net, kind=type("Net", (Other,), {}))},
        ["optimizer.0.class='Adam', not 'SGD'"],
    ),
    "learning rate": ({}, {"module": partial(net, lr=0.02)}, ["hyperparameters.lr=0.01, not 0.02", "optimizer.0.lr="]),
    "batch size": ({}, {"sequence": lambda: pair(batch_size=10)[:1]}, ["data.a.train.batch_size=20, not 10"]),
    "data": ({}, {"sequence": lambda: pair(seed=1)[:1]}, ["data.a.train.items.0.0."]),
    "metric": (
        {},
        {"sequence": lambda: pair(metric=MulticlassF1Score(4, average="macro"))[:1]},
        ["tasks.a.metric=None, not", "F1Score"],
    ),
    "metric's options": (
        {"sequence": lambda: pair(metric=MulticlassF1Score(4, average="micro"))[:1]},
        {"sequence": lambda: pair(metric=MulticlassF1Score(4, average="macro"))[:1]},
        ["tasks.a.metric.average='micro', not 'macro'"],
    ),
    "evaluate": (
        {"sequence": lambda: pair(evaluate=first_score)[:1]},
        {"sequence": lambda: pair(evaluate=second_score)[:1]},
        ["tasks.a.evaluate.function='first_score', not 'second_score'"],
    ),
    "evaluate as a lambda": (
        {"sequence": lambda: pair(evaluate=lambda net, batch: (net(batch[0]), batch[1]))[:1]},
        {"sequence": lambda: pair(evaluate=lambda net, batch: (net(batch[0]) + 1, batch[1]))[:1]},
        ["tasks.a.evaluate.code"],
    ),
    "precision": ({}, {"trainer": lambda: partial(quiet_trainer, precision="bf16-mixed")}, ["trainer.precision="]),
    "clipping": (
        {},
        {"trainer": lambda: lambda **given: quiet_trainer(gradient_clip_val=0.5, **given)},
        ["trainer.gradient_clip_val=None, not 0.5"],
    ),
    "accumulation": (
        {},
        {"trainer": lambda: partial(quiet_trainer, accumulate_grad_batches=2)},
        ["trainer.accumulate_grad_batches=1, not 2"],
    ),
    "custom perturbation": (perturbed(Scale(1.0)), perturbed(Scale(99.0)), ["invariance.perturbation.amount=1.0"]),
    "custom dataclass": (perturbed(Shift(0.1)), perturbed(Shift(0.2)), ["invariance.perturbation.by=0.1, not 0.2"]),
    "function in a dataclass": (
        perturbed(Shift(0.1, lambda x: x + 1)),
        perturbed(Shift(0.1, lambda x: x + 2)),
        ["invariance.perturbation.how.code"],
    ),
    "measure": (
        {"partition": PartitionCallback(measure=lambda a, x, b, y: a @ b.T, threshold=0.5)},
        {"partition": PartitionCallback(measure=lambda a, x, b, y: -a @ b.T, threshold=0.5)},
        ["partition.measured.code"],
    ),
    "stopping": (
        {"callbacks": [EarlyStopping("train_loss", patience=5)]},
        {"callbacks": [EarlyStopping("train_loss", patience=6)]},
        ["callbacks.EarlyStopping.patience=5, not 6"],
    ),
    "stopping at all": (
        {},
        {"callbacks": [EarlyStopping("train_loss", patience=6)]},
        ["callbacks.EarlyStopping=None, not"],
    ),
    "a batch, not all": (
        {},
        {"trainer": lambda: partial(quiet_trainer, limit_val_batches=1)},
        ["trainer.limit_val_batches=1.0, not 1"],
    ),
    "validation now and then": (
        {},
        {"trainer": lambda: partial(quiet_trainer, check_val_every_n_epoch=2)},
        ["trainer.check_val_every_n_epoch=1, not 2"],
    ),
    "validation within an epoch": (
        {},
        {"trainer": lambda: partial(quiet_trainer, val_check_interval=1)},
        ["trainer.val_check_interval=1.0, not 1"],
    ),
    "time": (
        {},
        {"trainer": lambda: partial(quiet_trainer, max_time="00:00:10:00")},
        ["trainer.max_time=None, not 600.0"],
    ),
    "test batches": (
        {},
        {"trainer": lambda: partial(quiet_trainer, limit_test_batches=2)},
        ["trainer.limit_test_batches=1.0, not 2"],
    ),
    "shuffling": (
        {"sequence": lambda: drawn(shuffle=False)},
        {"sequence": lambda: drawn(shuffle=True)},
        ["data.a.train.sampler.sampler.class='SequentialSampler', not 'RandomSampler'"],
    ),
    "weights of a sampler": (
        {"sequence": lambda: drawn(sampler=WeightedRandomSampler(torch.ones(40), 40))},
        {"sequence": lambda: drawn(sampler=WeightedRandomSampler(torch.arange(40.0), 40))},
        ["data.a.train.sampler.sampler.weights.size=1.0, not"],
    ),
    "a batch sampler": (
        {"sequence": lambda: drawn(0, batch_sampler=BatchSampler(range(40), 20, False))},
        {"sequence": lambda: drawn(0, batch_sampler=BatchSampler(range(40), 10, False))},
        ["data.a.train.sampler.batch_sampler.batch_size=20, not 10"],
    ),
    "collation": (
        {"sequence": lambda: drawn()},
        {"sequence": lambda: drawn(collate_fn=doubled)},
        ["data.a.train.batch='as collated', not"],
    ),
    "a single label": ({"sequence": lambda: drawn()}, {"sequence": lambda: drawn(other=5)}, ["data.a.train.labels="]),
    "held weights": ({}, {"module": held}, ["architecture.body.0=", "holds weight'"]),
    "a helper": (
        {"module": partial(net, kind=one_named(helper=lambda self, batch: self(batch[0])))},
        {"module": partial(net, kind=one_named(helper=lambda self, batch: self(batch[0]) * 2))},
        ["code.Plain.helper.code"],
    ),
    "a hook": (
        {"module": partial(net, kind=one_named())},
        {"module": partial(net, kind=one_named(on_after_backward=lambda self: None))},
        ["code.Plain.on_after_backward=None, not"],
    ),
    "seed": ({}, {"seed": 4}, ["seed=0, not 4"]),
}

FACTORIES = {"module", "sequence", "trainer"}


def start(root, options, allow=()):
    given = {**BASE, **options}
    return run_of(root, allow=allow, **{k: v() if k in FACTORIES else v for k, v in given.items()})


def open_and_close(run):
    try:
        run.start()
    finally:
        run.lock.release()


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A folder in which a run with the base options finished its first phase."""
    folders = {}

    def folder(name, options):
        key = name if options else ""
        if key not in folders:
            run = start(tmp_path_factory.mktemp("base"), options)
            run.start()
            run.phase("baseline", run.score)
            run.lock.release()
            folders[key] = run.store.root
        return folders[key]

    return folder


@pytest.mark.parametrize("name", CHANGES)
def test_a_difference_is_named_and_refused_and_the_same_again_is_not(stored, name):
    first, second, words = CHANGES[name]
    root = stored(name, first)
    open_and_close(start(root, first))
    with pytest.raises(ContinualError) as error:
        open_and_close(start(root, second))
    assert all(word in str(error.value) for word in words), error.value
    assert "holds a run with" in str(error.value)
    group = words[0].partition("=")[0].partition(".")[0]
    if group in ("order", "parameters"):
        assert "allow=" not in str(error.value)
        with pytest.raises(ContinualError, match=f"allow names '{group}'.*would not fit"):
            open_and_close(start(root, second, allow=[group]))
        return
    if "tasks." in str(error.value):
        return  # what a task is stays
    meant = [each for each in VARIABLE if f" {each}." in str(error.value) or f" {each}=" in str(error.value)]
    assert repr(meant[0]) in str(error.value).partition("allow=")[2]
    with pytest.warns(RunWarning, match="goes on with what allow= lets differ"):
        open_and_close(start(root, second, allow=meant))


def test_an_unknown_name_to_allow_is_refused_with_those_there_are(tmp_path):
    with pytest.raises(ContinualError, match=r"allow names 'optimiser', which runs are not told apart by.*optimizer"):
        start(tmp_path, {}, allow=["optimiser"]).start()
    with pytest.raises(ContinualError, match="allow must be a list"):
        start(tmp_path, {}, allow="optimizer").start()


def test_a_turned_order_is_refused_after_the_end_too(tmp_path):
    run_of(tmp_path).run()
    with pytest.raises(ContinualError, match=r"order=\['a', 'b'\], not \['b', 'a'\]"):
        run_of(tmp_path, sequence=pair()[::-1]).run()


def test_what_was_allowed_is_kept_and_told_once(tmp_path):
    run = start(tmp_path, {})
    run.start()
    run.phase("baseline", run.score)
    run.lock.release()
    with pytest.warns(RunWarning, match="epochs=1, not 2"):
        start(tmp_path, {"epochs": 2}, allow=["epochs"]).run()
    again = start(tmp_path, {"epochs": 2})
    again.run()
    assert again.progress.allowed == ["epochs=1, not 2"]


def test_a_file_of_pretrained_weights_is_known_by_what_it_holds(tmp_path):
    torch.save(net(seed=5).state_dict(), tmp_path / "weights.pt")
    run = start(tmp_path / "run", {"pretrained": tmp_path / "weights.pt"})
    run.start()
    run.phase("baseline", run.score)
    run.lock.release()
    (tmp_path / "elsewhere.pt").write_bytes((tmp_path / "weights.pt").read_bytes())
    open_and_close(start(tmp_path / "run", {"pretrained": tmp_path / "elsewhere.pt"}))
    torch.save(net(seed=6).state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ContinualError, match="pretrained="):
        open_and_close(start(tmp_path / "run", {"pretrained": tmp_path / "weights.pt"}))


# The same again


class Noisy(Dataset):
    """Augments with a generator of its own."""

    def __init__(self):
        import numpy as np

        self.generator = np.random.default_rng()

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return torch.from_numpy(self.generator.normal(size=6)).float() + index % 2, index % 2


def parts(sets, fraction=20):
    first, second = random_split(sets, [len(sets) - fraction, fraction])
    return {"train": DataLoader(first, 10, shuffle=True), "val": DataLoader(second, 20), "test": DataLoader(second, 20)}


def test_random_parts_and_augmentations_are_the_same_run(tmp_path):
    torch.manual_seed(1)
    whole = data([0, 1])["train"].dataset

    def sequence():
        return [Task("a", parts(whole), classes=[0, 1]), Task("b", parts(Noisy()), classes=[0, 1], outputs=[2, 3])]

    run_of(tmp_path, sequence=sequence()).run()
    torch.manual_seed(2)
    run_of(tmp_path, sequence=sequence()).run()
    with pytest.raises(ContinualError, match=r"data\.a\.train\.samples=20, not 25"):
        run_of(tmp_path, sequence=[Task("a", parts(whole, 15), classes=[0, 1]), sequence()[1]]).run()


def test_a_stream_is_not_read_to_know_it(tmp_path):
    read = []

    class Stream:
        def __iter__(self):
            for x, y in data([0, 1])["train"]:
                read.append(len(x))
                yield x, y

    def sequence():
        return [Task("a", {**data([0, 1]), "train": Stream()}, classes=[0, 1])]

    run = run_of(tmp_path, sequence=sequence())
    run.start()
    before = len(read)
    run.settings()
    run._identity = None
    run.settings()
    assert len(read) == before
    run.lock.release()


SCRIPT = """
import sys
import torch
from functools import partial
from torch import nn
sys.path.insert(0, sys.argv[2])
from learning import quiet_trainer
from runs import data
from lightning.pytorch import Callback, LightningModule
from lightning_cf import InvarianceCallback, PartitionCallback, SequentialTaskRunner, Task

RATE = 0.01
KINDS = {"relu", "tanh", "gelu"}


class Net(LightningModule):
    def __init__(self, names=frozenset({"a", "b", "c"}), act=lambda x: x.relu()):
        super().__init__()
        self.save_hyperparameters(ignore=["act"])
        self.names, self.act = names, act
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.act(self.body(x)) if "relu" in {"relu", "tanh"} else x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW([{"params": self.body.parameters()}, {"params": self.head.parameters(), "lr": RATE}])


class Quiet:
    def __init__(self, function, kinds):
        self.function, self.kinds, self.generator = function, kinds, torch.Generator()

    def __call__(self, vectors, generator):
        return self.function(vectors)


class Watch(Callback):
    def __init__(self, seen, note="x"):
        self.seen, self.note, self.born = seen, note, id(self)


SequentialTaskRunner(
    Net(),
    [Task("a", data([0, 1]), classes=[0, 1], evaluate=lambda net, batch: (net(batch[0]), batch[1]))],
    trainer=partial(quiet_trainer, gradient_clip_val=1.0),
    epochs=1,
    invariance_epochs=1,
    task_inference=None,
    isolation="perturb",
    partition=PartitionCallback(measure=lambda a, x, b, y: a @ b.T, threshold=0.1),
    invariance=InvarianceCallback(perturbation=Quiet(lambda v: v * 0, KINDS)),
    callbacks=[Watch([])],
    root=sys.argv[1],
).run()
print("done")
"""


@pytest.mark.slow
def test_the_same_script_is_the_same_run_in_another_process_folder_and_hash_seed(tmp_path):
    here, told = Path(__file__).parents[1], []
    for number, place in enumerate(("first", "second")):
        folder = tmp_path / place
        folder.mkdir()
        (folder / "script.py").write_text(SCRIPT)
        if number:
            (tmp_path / "run").rename(tmp_path / "moved")
        environment = {**os.environ, "PYTHONHASHSEED": str(number + 1), "PYTHONPATH": str(here.parent)}
        line = [sys.executable, "script.py", str(tmp_path / ("moved" if number else "run")), str(here)]
        done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.stdout == "done\n", done.stderr
        told.append(done.stderr)
    assert "came with other weights" in told[1]  # it never sets a seed, and is told so
    assert "differ" not in told[1]


def test_functions_are_known_by_what_they_do(unchecked):
    def make(n, text="x"):
        """Makes one."""
        return lambda x: x * n if x in {"a", "b"} else text

    def commented(n, text="x"):
        # Another comment, another docstring.
        """Makes another one."""
        return lambda x: x * n if x in {"a", "b"} else text

    assert describe(make(3)) != describe(make(4))
    assert describe(make(3))["code"] == describe(commented(3))["code"]
    assert describe(partial(make, 3)) != describe(partial(make, 4))
    assert not differences(describe(torch.Generator()), describe(torch.Generator().manual_seed(3)))
    assert not differences(describe("runs/2026-11-29_08-00-00"), describe("runs/2026-11-30_09-00-00"))
    assert describe("/somewhere/data.pt") == describe("/elsewhere/data.pt")
    assert describe({"b", "a"}) == ["a", "b"]


def test_rounding_is_no_other_data(unchecked):
    x = torch.randn(3, 50)
    nearly = x * (1 + 1e-6)
    turned = x[:, torch.randperm(50, generator=torch.Generator().manual_seed(1))]
    assert not differences({"data": describe(x)}, {"data": describe(nearly)})
    assert differences({"data": describe(x)}, {"data": describe(turned)})
    assert differences({"data": describe(torch.tensor([1, 2]))}, {"data": describe(torch.tensor([1, 3]))})


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.zeros(2), -torch.zeros(2)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        ({"a": 1}, {"b": 1}),
        ([1, [2]], [1, 2]),
        (1, True),
        (1.0, 1),
        ("1", 1),
    ],
)
def test_checksums_follow_every_bit(one, other):
    assert content_sha256({"x": one}) == content_sha256({"x": one})
    assert content_sha256({"x": one}) != content_sha256({"x": other})
    assert len(TensorDataset(torch.zeros(1))) == 1


class Known:
    """As data modules, data frames and their parts are: everybody knows everybody."""

    def __init__(self, number, others):
        self.number, self.others = number, others


def test_objects_that_know_one_another_are_described_in_no_time():
    others = []
    others += [Known(number, others) for number in range(30)]
    text = json.dumps(describe(others[0]))
    assert len(text) < 100_000
    assert text == json.dumps(describe(others[0]))
    assert json.loads(text)["number"] == 0


class Unready(Net):
    """Whose optimiser cannot be made."""

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=-1.0)


def test_a_run_that_failed_before_it_trained_leaves_its_folder_to_a_corrected_one(tmp_path):
    make = partial(quiet_trainer, logger=False)
    options = {"trainer": make, "epochs": 1, "invariance_epochs": 1, "root": tmp_path}
    with pytest.raises(ValueError, match="Invalid learning rate"):
        SequentialTaskRunner(net(kind=Unready), pair(), **options).run()
    result = SequentialTaskRunner(net(), pair(), **options).run()
    assert len(result.accuracy.matrix) == 2
