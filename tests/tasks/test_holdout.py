"""Samples are held out by the loader's sampler; everything else of the loader stays what it is."""

import os
import pathlib
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from learning import quiet_trainer
from lightning.pytorch import Callback, LightningDataModule
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, DataLoader, StackDataset, Subset, TensorDataset, random_split
from toys import Net, fit, numbers

from lightning_cf import InvarianceCallback, MaskedGradientCallback, PartitionCallback, SequentialTaskRunner, Task
from lightning_cf.callbacks import label_watch
from lightning_cf.errors import DataWarning
from lightning_cf.sequence.joint import JointTask
from lightning_cf.tasks.holdout import MOST, split
from lightning_cf.tasks.part_samplers import PartSampler
from lightning_cf.utilities.randomness import keyed_generator


def held_before(size, share=0.1, name="a"):
    """What was held out ever since."""
    order = torch.randperm(size, generator=keyed_generator("holdout", name, size)).tolist()
    return sorted(order[int(size * share) :]), sorted(order[: int(size * share)])


class Weighted(TensorDataset):
    class_weights = (0.5, 1.5)


class Own(DataLoader):
    """A loader of one's own class."""

    def __init__(self, *args, note="mine", **options):
        super().__init__(*args, **options)
        self.note = note


def given(size=64, kind=DataLoader, **options):
    return kind(Weighted(*numbers(size)), **({"batch_size": 16, "shuffle": True} | options))


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("own", [True, False], ids=["own generator", "global generator"])
def test_the_samples_and_their_order_are_those_of_a_subset(shuffle, own):
    generator = torch.Generator().manual_seed(3) if own else None
    plain = given(shuffle=shuffle, generator=generator)
    kept, held = held_before(64)
    torch.manual_seed(0)
    subset = DataLoader(Subset(plain.dataset, kept), 16, shuffle=shuffle, generator=generator)
    expected = [x.tolist() for _ in range(2) for x, _ in subset]
    if own:
        generator.manual_seed(3)
    task = Task("a", {"train": plain}, classes=[0, 1])
    torch.manual_seed(0)
    train = task.train_dataloader()
    assert [x.tolist() for _ in range(2) for x, _ in train] == expected
    judged = torch.cat([x for x, _ in task.judging_batches()])
    assert torch.equal(judged, plain.dataset.tensors[0][held])


def test_the_loader_stays_what_it_is():
    def collate(samples):
        return torch.utils.data.default_collate(samples)

    plain = given(kind=Own, collate_fn=collate, num_workers=1, prefetch_factor=3, multiprocessing_context="spawn")
    train = Task("a", {"train": plain}, classes=[0, 1]).train_dataloader()
    assert type(train) is Own
    for name in ("dataset", "note", "collate_fn", "num_workers", "prefetch_factor", "multiprocessing_context"):
        assert getattr(train, name) is getattr(plain, name)
    assert train.dataset.class_weights == (0.5, 1.5)
    assert (len(train.sampler), len(plain.sampler)) == (58, 64)


def test_class_weights_are_found_in_a_fit():
    class Balanced(Net):
        def on_train_start(self):
            self.found = self.trainer.train_dataloader.dataset.class_weights

    net = Balanced()
    fit(net, Task("a", {"train": given()}, classes=[0, 1]))
    assert net.found == (0.5, 1.5)


@pytest.mark.parametrize(
    ("size", "batch", "drop_last", "held"),
    [
        (40, 8, False, 4),
        (37, 33, False, 2),
        (36, 33, False, 3),
        (34, 33, False, 3),
        (20, 20, True, 0),
        (20, 20, False, 2),
        (40, 20, True, 0),
        (60, 20, True, 6),
        (30, 1, False, 3),
    ],
)
def test_what_is_left_makes_batches_like_those_of_all(size, batch, drop_last, held):
    parts = split(given(size, batch_size=batch, drop_last=drop_last), 0.1, name="a")
    assert len(parts.held.sampler if held else ()) == held
    lengths = [len(y) for _, y in parts.train]
    assert lengths
    assert lengths[-1] > 1 or batch == 1
    assert bool(parts.why) == (held == 0)


def test_a_data_set_of_any_length_is_split_without_a_list_of_it():
    data = range(10**12)
    parts = split(DataLoader(data, 16), 0.1, name="a")
    held = parts.held.sampler.indices
    assert len(held) == len(set(held)) == MOST
    assert list(held) == sorted(held)
    assert len(parts.train.sampler) == 10**12 - MOST
    near = held[100]
    rest = parts.train.sampler.indices
    assert {near - 1, near, near + 1} - set(rest[near - 110 : near + 10]) == {near - 1, near, near + 1} & set(held)
    assert rest[-1] < 10**12


class Resized(torch.utils.data.Dataset):
    """As long as it is told."""

    def __init__(self, size):
        self.size, self.read = size, []

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if index >= self.size:
            raise IndexError(f"{index} of {self.size}")
        self.read.append(index)
        x, y = numbers(64)
        return x[index % 64], y[index % 64]


class Resizes(Net):
    """Leaves samples out from epoch to epoch, or takes some in."""

    def __init__(self, by):
        super().__init__()
        self.by, self.seen = by, []

    def on_train_epoch_start(self):
        self.data = self.trainer.train_dataloader.dataset
        self.data.read.clear()

    def on_train_epoch_end(self):
        self.seen.append(sorted(self.data.read))
        self.data.size += self.by


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("by", [-17, 3])
def test_a_data_set_may_change_its_length_between_epochs(by, shuffle):
    """What was held out is not trained on, and judges while it is there."""
    net, data = Resizes(by), Resized(64)
    task = Task("a", {"train": DataLoader(data, 8, shuffle=shuffle)}, classes=[0, 1])
    held = held_before(64)[1]
    fit(net, task, [], max_epochs=3)
    sizes = [64, 64 + by, 64 + 2 * by]
    assert net.seen == [sorted({*range(size)} - {*held}) for size in sizes]
    assert sum(len(y) for _, y in task.judging_batches()) == sum(index < data.size for index in held)
    ours = Resizes(by)
    fit(ours, Task("a", {"train": DataLoader(Resized(64), 8, shuffle=shuffle)}, classes=[0, 1]), max_epochs=3)
    assert ours.steps == net.steps


@pytest.mark.parametrize("size", [5, 7, 64])
def test_what_is_left_is_all_that_is_not_held_out(size):
    parts = split(given(size), 0.5, name="a")
    held, rest = parts.held.sampler.indices, parts.train.sampler.indices
    assert sorted([*held, *rest]) == list(range(size))
    assert list(rest) == sorted(rest)


def test_targets_that_cannot_be_asked_for_tell_no_classes():
    class Asked(TensorDataset):
        @property
        def targets(self):
            raise NotImplementedError

    parts = split(DataLoader(Asked(numbers(40)[0]), 8), 0.1, name="a")
    assert len(parts.held.sampler) == 4


def test_batchnorm_trains_where_it_would_without_us():
    net = Net(norm=True)
    fit(net, Task("a", {"train": given(37, batch_size=33)}, classes=[0, 1]))
    assert net.steps == 2


class Targets(torch.utils.data.Dataset):
    """As torchvision's data sets keep their labels."""

    def __init__(self, x, y):
        self.x, self.targets = x, y.tolist()

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], self.targets[index]


class Labels(Targets):
    """As its set of house numbers does."""

    def __init__(self, x, y):
        super().__init__(x, y)
        self.labels = np.array(self.targets)
        del self.targets


LABELLED = {
    "tensors": TensorDataset,
    "column": lambda x, y: TensorDataset(x, y[:, None]),
    "one-hot": lambda x, y: TensorDataset(x, F.one_hot(y, 3).float()),
    "bools": lambda x, y: TensorDataset(x, F.one_hot(y, 3).bool()),
    "weights first": lambda x, y: TensorDataset(x, torch.ones(len(x)), y),
    "numbers first": lambda x, y: TensorDataset(x, torch.arange(len(x)), y),
    "domains last": lambda x, y: TensorDataset(x, y, torch.arange(len(x)) % 3),
    "targets": Targets,
    "labels": Labels,
    "subset": lambda x, y: Subset(Targets(x, y), range(len(x))),
    "concatenated": lambda x, y: ConcatDataset([TensorDataset(x[:9], y[:9]), Subset(Targets(x, y), range(9, len(x)))]),
    "stacked": lambda x, y: StackDataset(x, y),
    "stacked by name": lambda x, y: StackDataset(x=x, y=y.tolist()),
}


@pytest.mark.parametrize("rare", [1, 2])
@pytest.mark.parametrize("kind", LABELLED)
def test_of_a_rare_class_a_sample_stays_to_be_learned_from(rare, kind):
    _, held = held_before(40)
    x, y = torch.randn(40, 3), torch.arange(40) % 2
    y[held[:rare]] = 2  # which would be held out whole
    parts = split(DataLoader(LABELLED[kind](x, y), 4), 0.1, name="a")
    learned, judged = (y[list(part.sampler)].tolist() for part in (parts.train, parts.held))
    assert learned.count(2) == 1 and judged.count(2) == rare - 1
    assert len(judged) == 4 and len(learned) == 36


class Read(torch.utils.data.Dataset):
    """Its labels are known of samples that are read."""

    def __init__(self, x, y):
        self.pairs = list(zip(x, y, strict=True))

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        return self.pairs[index]


@pytest.mark.parametrize("on_a_gpu", [True, False])
def test_a_class_that_is_not_trained_on_is_told(on_a_gpu, monkeypatch):
    x, y = numbers(64)
    y[:] = 0
    y[held_before(64)[1][:1]] = 1
    if on_a_gpu:
        monkeypatch.setattr(label_watch, "_CPU", "another")
    told = "Task 'a' declares classes .0, 1., but no training batch of the fit holds label 1, .* held out to judge"
    with pytest.warns(DataWarning, match=told):
        fit(Net(), Task("a", {"train": DataLoader(Read(x, y), 16)}, classes=[0, 1]))
    y[:32] = 1
    fit(Net(), Task("a", {"train": DataLoader(Read(x, y), 16)}, classes=[0, 1]))
    fit(Net(), Task("a", {"train": DataLoader(Read(x, y), 16)}, classes=[0, 1]), limit_train_batches=1)


class Chunks(LightningDataModule):
    """A part of the data an epoch: of label 0 in even ones, of label 1 in odd ones."""

    def train_dataloader(self):
        x, _ = numbers(32)
        return DataLoader(TensorDataset(x, torch.full((32,), self.trainer.current_epoch % 2)), 8)

    def val_dataloader(self):
        return DataLoader(TensorDataset(*numbers(32)), 8)


class StopsAt(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step == self.step


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"max_epochs": 2}, False),
        ({"max_epochs": 1}, True),
        ({"max_epochs": -1, "max_steps": 7}, False),
        ({"max_epochs": -1, "max_steps": 2}, False),
        ({"max_epochs": 3, "stop": 4}, True),
        ({"max_epochs": 3, "stop": 2}, False),
    ],
    ids=["both epochs", "one epoch", "one and a half", "half an epoch", "stopped after one", "stopped in one"],
)
@pytest.mark.parametrize("on_a_gpu", [True, False])
def test_a_class_is_missing_where_no_epoch_holds_it(options, told, on_a_gpu, monkeypatch):
    if on_a_gpu:
        monkeypatch.setattr(label_watch, "_CPU", "another")
    options = dict(options)
    stops = [StopsAt(options.pop("stop"))] if "stop" in options else []
    callbacks = [PartitionCallback(), InvarianceCallback(), MaskedGradientCallback(), *stops]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fit(Net(), Task("a", Chunks(), classes=[0, 1]), callbacks, reload_dataloaders_every_n_epochs=1, **options)
    assert any("of the fit holds label 1" in str(each.message) for each in said) == told


def test_classes_of_one_sample_each_spare_none():
    parts = split(DataLoader(TensorDataset(torch.randn(40, 3), torch.arange(40)), 4), 0.1, name="a")
    assert parts.train is parts.held and "most of its classes have one sample each" in parts.why
    parts = split(DataLoader(TensorDataset(torch.randn(40, 3), torch.arange(40)), 4), 0.1, name="a", classes=False)
    assert (len(parts.held.sampler), len(parts.train.sampler), parts.why) == (4, 36, "")  # whole numbers to be guessed


class Draws(LightningDataModule):
    """Splits anew whenever it is asked, as many do."""

    def __init__(self, seed=None):
        super().__init__()
        self.data, self.seed = TensorDataset(*numbers(64)), seed

    def train_dataloader(self):
        generator = None if self.seed is None else torch.Generator().manual_seed(self.seed)
        return DataLoader(random_split(self.data, [48, 16], generator)[0], 8)


def test_a_split_that_is_drawn_anew_for_each_fit_is_told():
    task, net = Task("a", Draws(), classes=[0, 1]), Net()
    fit(net, task)
    with pytest.warns(DataWarning, match=r"Task 'a': its train_dataloader\(\) gives other samples than before"):
        fit(net, task)
    task, net = Task("a", Draws(seed=3), classes=[0, 1]), Net()
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        fit(net, task)
        fit(net, task)


class SetUp(LightningDataModule):
    """Splits when it is set up, as many do: without a seed, and differently for testing."""

    def __init__(self):
        super().__init__()
        self.data, self.splits = TensorDataset(*numbers(64)), []

    def setup(self, stage):
        self.parts = random_split(self.data, [32, 32])
        self.splits.append((str(getattr(stage, "value", stage)), tuple(self.parts[0].indices)))

    def train_dataloader(self):
        return DataLoader(self.parts[0], 8)

    def val_dataloader(self):
        return DataLoader(self.parts[1], 8)


def test_a_split_that_is_drawn_when_the_data_are_set_up_is_the_same_in_every_fit(tmp_path):
    data, net = SetUp(), Net()
    task = Task("a", data, classes=[0, 1])
    for _ in range(2):
        fit(net, task)
    assert len(data.splits) == 2 and len({*data.splits}) == 1
    found = []
    for seed in range(2):  # as in two processes
        torch.manual_seed(seed)
        data = SetUp()
        runner = SequentialTaskRunner(
            Net(), [Task("a", data, classes=[0, 1])], trainer=quiet_trainer, epochs=1, invariance_epochs=1,
            root=tmp_path / str(seed), task_inference=None,
        )  # fmt: skip
        runner.run()
        found.append({*data.splits})
    assert found[0] == found[1]
    assert sorted(stage for stage, _ in found[0]) == ["fit", "test"]
    assert len({split for _, split in found[0]}) == 1


class DrawsSamples(LightningDataModule):
    """Draws the samples of each stage when that is set up."""

    def setup(self, stage):
        if stage == "fit":
            self.train, self.val = (TensorDataset(torch.randn(32, 4), torch.arange(32) % 2) for _ in range(2))
        if stage == "test":
            self.test = TensorDataset(torch.randn(32, 4), torch.arange(32) % 2)

    def train_dataloader(self):
        return DataLoader(self.train, 8)

    def val_dataloader(self):
        return DataLoader(self.val, 8)

    def test_dataloader(self):
        return DataLoader(self.test, 8)


def test_samples_that_are_drawn_for_testing_alone_are_others_than_those_of_training():
    data = DrawsSamples()
    task, drawn = Task("a", data, classes=[0, 1]), []
    for _ in range(2):
        for stage in ("fit", "test"):
            task.setup(stage)
        drawn.append([data.train.tensors[0], data.val.tensors[0], data.test.tensors[0]])
    first, second = drawn
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    assert not any(torch.equal(first[2], x) for x in first[:2])


class SetsAllUp(SetUp):
    """Sets up everything for whatever stage."""

    def __init__(self):
        super().__init__()
        self.data = TensorDataset(*numbers(320))

    def setup(self, stage):
        self.parts = random_split(self.data, [240, 80])

    def test_dataloader(self):
        return DataLoader(self.parts[1], 8)

    val_dataloader = LightningDataModule.val_dataloader


def test_a_split_that_is_drawn_for_testing_too_tests_nothing_that_was_trained_on(tmp_path):
    data = SetsAllUp()
    task = Task("a", data, classes=[0, 1])
    fit(Net(), task)
    trained = {*data.parts[0].indices}
    task.setup("test")
    assert not trained & {*data.parts[1].indices}
    task = Task("b", SetsAllUp(), classes=[0, 1])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*other samples than before")
        SequentialTaskRunner(
            Net(), [task], trainer=quiet_trainer, epochs=1, invariance_epochs=1, root=tmp_path, task_inference=None
        ).run()


def test_where_nothing_can_be_spared_the_training_data_judge_and_that_is_said():
    net = Net()
    with pytest.warns(DataWarning, match="none of its training data can be held out: 20 samples in batches of 20 and"):
        fit(net, Task("a", {"train": given(20, batch_size=20, drop_last=True)}, classes=[0, 1]), max_epochs=2)
    assert net.steps == 2


def test_a_loader_that_keeps_an_iterator_is_left_whole():
    class Endless(DataLoader):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.kept = super().__iter__()

    plain = given(kind=Endless)
    assert split(plain, 0.1, name="a").train is plain


@pytest.mark.parametrize(
    ("options", "steps"), [({"limit_train_batches": 0.2}, 1), ({"val_check_interval": 5}, 5)], ids=["share", "interval"]
)
def test_nothing_is_held_out_where_the_trainers_options_count_on_all_batches(options, steps):
    net = Net()
    with pytest.warns(DataWarning, match="limit_train_batches or val_check_interval counts on all of its batches"):
        fit(net, Task("a", {"train": given(65, batch_size=16)}, classes=[0, 1]), **options)
    assert net.steps == steps


def test_the_sampler_knows_the_data_set_as_those_of_torch_do():
    plain = given(64, batch_size=16)
    assert split(plain, 0.1, name="a").train.sampler.data_source is plain.dataset


def test_overfitting_holds_nothing_out():
    net = Net()
    with pytest.warns(DataWarning, match="overfit_batches trains on the first samples only"):
        fit(net, Task("a", {"train": given()}, classes=[0, 1]), overfit_batches=2)
    assert net.steps == 2


def test_joint_training_leaves_out_what_is_held_out():
    data = DataLoader(TensorDataset(torch.arange(64.0)[:, None], torch.zeros(64).long()), 16, shuffle=True)
    joint = JointTask([Task("a", {"train": data}, classes=[0])], None)
    seen = sorted(int(x) for (batch, _), _ in joint.train_dataloader() for x in batch)
    assert seen == held_before(64)[0]


# Several processes


@pytest.mark.parametrize("shuffled", [True, False], ids=["recorded", "not recorded"])
def test_a_part_is_listed_alike_on_all_processes(shuffled):
    """Lightning shuffles a loader that it saw made; else the part does, by seed and epoch."""
    plain = given()
    if shuffled:
        plain.__dict__.update(__pl_saved_kwargs={"shuffle": True}, __pl_saved_arg_names=())
    sampler = split(plain, 0.1, name="a", processes=2).train.sampler
    assert isinstance(sampler, PartSampler)
    torch.manual_seed(0)
    one = list(sampler)
    torch.manual_seed(1)
    assert list(sampler) == one
    sampler.set_epoch(1)
    assert sorted(sampler) == sorted(one) == held_before(64)[0]
    assert (list(sampler) == one) == shuffled


SCRIPT = """
import sys, torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, TensorDataset
sys.path.insert(0, {tests!r})
from learning import quiet_trainer
from toys import Net, numbers
from lightning_cf import InvarianceCallback, MaskedGradientCallback, PartitionCallback, Task

class Numbered(Net):
    seen = []
    def training_step(self, batch, batch_idx):
        self.seen += batch[1][:, 1].tolist()
        return self.loss(self(batch[0]), batch[1][:, 0])
    def validation_step(self, *args): pass

x, y = numbers(65)
loader = DataLoader(TensorDataset(x, torch.stack([y, torch.arange(65)], 1)), 16, shuffle=True)
task = Task("a", {{"train": loader}}, classes=[0, 1], evaluate=lambda net, b: (net(b[0]), b[1][:, 0]))
net = Numbered()
trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, logger=False, enable_checkpointing=False,
                  enable_progress_bar=False, enable_model_summary=False,
                  callbacks=[PartitionCallback(after=0.5), InvarianceCallback(), MaskedGradientCallback()])
trainer.fit(net, datamodule=task)
held = set(int(n) for _, b in task.judging_batches() for n in b[:, 1])
torch.save((net.seen, held), f"{folder}/{{trainer.global_rank}}.pt")
"""


@pytest.mark.slow
def test_held_out_samples_are_trained_on_by_no_process(tmp_path):
    tests = str(pathlib.Path(__file__).parents[1])
    (tmp_path / "script.py").write_text(SCRIPT.format(tests=tests, folder=str(tmp_path)))
    environment = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "WORLD_SIZE", "RANK")}
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (one, held), (other, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert len(held) == 6
    assert not held & {*one, *other}
    assert {*one, *other} == set(range(65)) - held
    assert len(one) == len(other) == 2 * 30
