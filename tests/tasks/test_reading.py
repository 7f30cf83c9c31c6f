import copy
import csv
import itertools
import json
import multiprocessing
import queue
import sqlite3
import threading
import weakref
from functools import partial

import numpy as np
import pytest
import torch
from learning import quiet_trainer
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import BatchSampler, ChainDataset, DataLoader, IterableDataset, TensorDataset
from toys import Counted, Net, fit, loader, numbers

from lightning_cf import SequentialTaskRunner, Task, TaskInferenceCallback
from lightning_cf.errors import ContinualError, DataWarning
from lightning_cf.learner.keeping import state_of
from lightning_cf.tasks.reading import Limits
from lightning_cf.tasks.streams import reads_once


def batches(count=36):
    x, y = numbers(16)
    return [(x, y)] * count


class Yields(IterableDataset):
    def __init__(self, held):
        self.held = held

    def __iter__(self):
        yield from self.held


class Loops(Yields):
    def __iter__(self):
        for sample in self.held:  # noqa: UP028
            yield sample


class Given(Yields):
    def __iter__(self):
        return self.held


class Itself(Yields):
    def __iter__(self):
        return self

    def __next__(self):
        return next(self.held)


class Helped(Yields):
    def __iter__(self):
        return self._drawn()

    def _drawn(self):
        yield from self.held


class Position(Yields):
    """Goes on where it stopped."""

    def __init__(self, held):
        self.held, self.at = list(held), 0

    def __iter__(self):
        while self.at < len(self.held):
            self.at += 1
            yield self.held[self.at - 1]


class Queue(Yields):
    def __init__(self, held):
        self.held = list(held)

    def __iter__(self):
        while self.held:
            yield self.held.pop(0)


def stream(count=64):
    return (pair for pair in zip(*numbers(count), strict=True))


ONCE = [Yields, Loops, Given, Itself, Helped, Position, Queue]


def left(source):
    """How many samples are still to come."""
    return sum(1 for _ in source)


@pytest.mark.parametrize("kind", ONCE)
@pytest.mark.parametrize("validation", [True, False], ids=["validated", "alone"])
def test_a_stream_is_refused_before_training_and_nothing_is_taken_from_it(kind, validation):
    data = kind(stream())
    task = Task("a", {"train": DataLoader(data, 8)} | ({"val": loader()} if validation else {}), classes=[0, 1])
    net = Net()
    with pytest.raises(ContinualError, match=r"Task 'a': its train_dataloader\(\) gives batches that can be read once"):
        fit(net, task)
    assert net.steps == 0
    assert left(data) == 64


@pytest.mark.parametrize("make", [iter, lambda b: (x for x in b), lambda b: map(tuple, b), enumerate])
def test_iterators_are_refused_unread(make):
    source = make(batches())
    with pytest.raises(ContinualError, match="can be read once only"):
        fit(Net(), Task("a", {"train": source, "val": loader()}, classes=[0, 1]))
    assert left(source) == 36


def test_a_validation_or_test_stream_is_refused_too(tmp_path):
    for stage in ("val", "test"):
        data = Yields(stream())
        task = Task("a", {"train": loader(), stage: DataLoader(data, 8)}, classes=[0, 1])
        with pytest.raises(ContinualError, match=rf"its {stage}_dataloader\(\) gives batches that can be read once"):
            SequentialTaskRunner(Net(), [task], trainer=quiet_trainer, root=tmp_path / stage).run()
        assert left(data) == 64


def test_samplers_that_end_are_refused():
    data = TensorDataset(*numbers())
    assert "sampler" in reads_once(DataLoader(data, 8, sampler=iter(range(64))))
    assert "sampler" in reads_once(DataLoader(data, batch_sampler=iter([[0, 1], [2, 3]])))
    assert reads_once(DataLoader(data, 8, shuffle=True)) == ""


class GoesOn:
    """Its own iterator, which sets itself back where it ends, as DALI's do."""

    def __init__(self, held):
        self.held, self.at = list(held), 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.at == len(self.held):
            self.at = 0
            raise StopIteration
        self.at += 1
        return self.held[self.at - 1]

    def __len__(self):
        return len(self.held)


class GoesOnInside(IterableDataset):
    """A stream that goes on where it stood, and begins anew at its end."""

    def __init__(self, held):
        self.inner = GoesOn(held)

    def __iter__(self):
        yield from self.inner


class Prefetches(GoesOn):
    """Holds a loader's iterator, of which there is no copy."""

    def __init__(self, held):
        self.loader = DataLoader(list(held), 1)
        self.held = iter(self.loader)

    def __next__(self):
        try:
            return next(self.held)
        except StopIteration:
            self.held = iter(self.loader)
            raise


class Caches(IterableDataset):
    """Later passes give what the first one came to."""

    def __init__(self, held):
        self.held, self.cache = list(held), []

    def __iter__(self):
        if self.cache:
            yield from self.cache
            return
        for sample in self.held:
            self.cache.append(sample)
            yield sample


@pytest.mark.parametrize("stage", ["train", "val"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: GoesOn(batches(4)),
        lambda: Prefetches(stream()),
        lambda: DataLoader(GoesOnInside(stream()), 8),
        lambda: DataLoader(Caches(stream()), 8),
    ],
    ids=["itself", "prefetches", "inside", "caches"],
)
def test_what_a_look_at_its_first_batch_shortens_is_refused(make, stage):
    net, data = Net(), {"train": loader(), "val": loader()}
    with pytest.raises(ContinualError, match=rf"its {stage}_dataloader\(\) gives batches that can be read once only"):
        fit(net, Task("a", data | {stage: make()}, classes=[0, 1]))
    assert net.steps == 0


# What cannot be copied


class Takes(IterableDataset):
    """Takes what others put into a queue."""

    def __init__(self, queue):
        self.queue = queue

    def __iter__(self):
        while not self.queue.empty():
            yield self.queue.get()


class Receives(IterableDataset):
    def __init__(self, connection):
        self.connection = connection

    def __iter__(self):
        while self.connection.poll():
            yield self.connection.recv()


def filled(kind):
    found = kind()
    for sample in batches(1)[0][1].tolist():
        found.put(sample)
    while found.empty():
        pass  # until the thread has put it there that a queue of processes has
    return found


def piped():
    end, other = multiprocessing.Pipe()
    other.send(1)
    return end


@pytest.mark.parametrize("held", ["alone", "chained", "mapped", "in a loader"])
@pytest.mark.parametrize("kind", [queue.Queue, queue.SimpleQueue, multiprocessing.Queue, "pipe"])
def test_what_takes_from_a_queue_is_refused_and_nothing_is_taken(kind, held):
    data = Receives(piped()) if kind == "pipe" else Takes(filled(kind))
    holding = {"alone": lambda x: x, "chained": lambda x: ChainDataset([x]), "mapped": Yields}
    source = Yields(DataLoader(data, 1)) if held == "in a loader" else holding[held](data)
    with pytest.raises(ContinualError, match="whose samples are gone once they are read"):
        fit(Net(), Task("a", {"train": DataLoader(source, 8), "val": loader()}, classes=[0, 1]))
    assert data.connection.poll() if kind == "pipe" else kind is multiprocessing.Queue or data.queue.qsize() == 16


def test_processes_that_read_share_queues_of_processes_only():
    for kind, shared in [(queue.Queue, False), (multiprocessing.Queue, True)]:
        assert bool(reads_once(DataLoader(Takes(filled(kind)), 8, num_workers=1))) == shared


class Noted(Yields):
    """Reads its settings and its samples with get(), and others wait for what it says in a queue."""

    def __init__(self):
        self.held, self.settings, self.said = [{"x": x, "y": y} for x, y in stream()], {"log": False}, queue.Queue()
        self.said.put("begun")

    def __iter__(self):
        settings = self.settings
        for sample in self.held:
            yield sample.get("x"), sample.get("y")
        if self.settings.get("log") or settings.get("log"):
            self.waiting = self.said.qsize()


class Pool(Yields):
    """Takes a buffer for each sample, and puts it back at the next step."""

    def __init__(self, buffers):
        self.held, self.free = list(stream()), queue.Queue()
        for _ in range(buffers):
            self.free.put(torch.empty(6))

    def __iter__(self):
        for x, y in self.held:
            buffer = self.free.get()
            yield buffer.copy_(x), y
            self.free.put(buffer)


class Aliased(Takes):
    """Takes from its queue by another name."""

    def __iter__(self):
        waiting = self.queue
        while not waiting.empty():
            yield waiting.get_nowait()


class Kept(Takes):
    def __iter__(self):
        self.now = self.queue
        while not self.now.empty():
            yield self.now.get()


class Bound(Takes):
    def __iter__(self):
        yield from iter(self.queue.get, None)


class Named(Takes):
    def __iter__(self):
        yield from iter(getattr(self, "queue").get, None)  # noqa: B009


class Selects(IterableDataset):
    """Reads a table by one cursor, which each pass executes anew."""

    def __init__(self):
        self.base = sqlite3.connect(":memory:")
        weakref.finalize(self, self.base.close)
        self.base.execute("create table samples (x, y)")
        self.base.executemany(
            "insert into samples values (?, ?)", [(json.dumps(x.tolist()), int(y)) for x, y in stream()]
        )
        self.cursor = self.base.cursor()

    def __iter__(self):
        self.cursor.execute("select x, y from samples")
        for x, y in self.cursor:
            yield torch.tensor(json.loads(x)), y


class GoesOnSelecting(Selects):
    """Executes something else, and reads on where its cursor stood."""

    def __init__(self):
        super().__init__()
        self.cursor.execute("select x, y from samples")

    def __iter__(self):
        self.base.execute("select count(*) from samples")
        for x, y in self.cursor:
            yield torch.tensor(json.loads(x)), y


def without_end(samples):
    while True:
        yield from samples


class Slices(IterableDataset):
    """So many an epoch of samples without end."""

    def __init__(self):
        self.samples = without_end(list(stream()))

    def __iter__(self):
        yield from itertools.islice(self.samples, 48)


class Counts(Yields):
    """Numbers its samples without end, which no sample tells."""

    def __init__(self):
        self.held, self.numbers = list(stream()), (10 * i for i in itertools.count())

    def __iter__(self):
        for sample in self.held:
            next(self.numbers)
            yield sample


def test_a_part_of_what_has_no_end_is_trained_on_and_told():
    net = Net()
    with pytest.warns(DataWarning, match="two looks at its first batch gave different ones"):
        fit(net, Task("a", {"train": DataLoader(Slices(), 8), "val": loader()}, classes=[0, 1]), max_epochs=2)
    assert net.steps == 12


def taken(waiting):
    while True:
        yield waiting.get()


def test_a_generator_that_takes_from_a_queue_for_ever_is_refused_unread():
    data = Slices()
    waiting = filled(queue.Queue)
    data.samples = taken(waiting)
    assert "samples is a generator, which all passes go on with" in reads_once(DataLoader(data, 8))
    assert waiting.qsize() == 16


class Lines(IterableDataset):
    """Reads the lines of a file by something that it keeps."""

    def __init__(self, file, by):
        self.file, self.lines = file, by(file)

    def __iter__(self):
        self.file.seek(0)
        return self.rows()

    def rows(self):
        for line in self.lines:
            values = list(line.values() if isinstance(line, dict) else line)
            yield torch.tensor([float(x) for x in values[:6]]), torch.tensor(int(values[6]))


class GoesOnReading(Lines):
    def __iter__(self):
        return self.rows()


def cut(line):
    return line.split(",")


LINES = [csv.reader, partial(csv.DictReader, fieldnames="abcdefg"), partial(map, cut)]


@pytest.fixture
def written(tmp_path):
    x, y = numbers()
    np.savetxt(tmp_path / "lines", torch.column_stack([x, y]), fmt="%g", delimiter=",")
    with (tmp_path / "lines").open() as file:
        yield file


@pytest.mark.parametrize("by", LINES)
def test_lines_of_a_file_that_each_pass_sets_to_its_beginning_are_read_again(by, written):
    net = Net()
    fit(net, Task("a", {"train": DataLoader(Lines(written, by), 16), "val": loader()}, classes=[0, 1]), max_epochs=3)
    assert net.steps == 12


@pytest.mark.parametrize("by", LINES)
def test_lines_of_a_file_that_goes_on_are_refused_unread(by, written):
    data = GoesOnReading(written, by)
    assert "which all passes go on with" in reads_once(DataLoader(data, 16))
    assert written.tell() == 0


def test_a_cursor_that_is_not_executed_anew_is_refused_unread():
    data = GoesOnSelecting()
    assert "cursor is a Cursor, which all passes go on with" in reads_once(DataLoader(data, 8))
    assert len(list(data.cursor)) == 64


@pytest.mark.parametrize("kind", [Takes, Aliased, Kept, Bound, Named])
def test_a_queue_that_is_read_by_another_name_is_found_and_nothing_is_taken(kind):
    data = kind(filled(queue.Queue))
    assert "samples are gone once they are read" in reads_once(DataLoader(data, 8))
    assert data.queue.qsize() == 16


class Prepares(IterableDataset):
    """Has a thread fill a queue of each pass."""

    def __init__(self):
        self.queue, self.samples = queue.Queue(), list(stream())

    def fill(self):
        for sample in [*self.samples, None]:
            self.queue.put(sample)

    def __iter__(self):
        self.queue = queue.Queue()
        threading.Thread(target=self.fill).start()
        yield from iter(self.queue.get, None)


class Locked(IterableDataset):
    """Of a lock there is no copy."""

    def __init__(self):
        self.lock, self.samples = threading.Lock(), list(stream())

    def __iter__(self):
        with self.lock:
            yield from self.samples


class Client(Locked):
    """Its samples are gone once they are asked for, which nobody can see."""

    def __iter__(self):
        while self.samples:
            yield self.samples.pop(0)


def test_a_stream_that_cannot_be_copied_and_gives_nothing_or_something_else_is_refused_or_told():
    with pytest.raises(ContinualError, match="a second pass over it gives nothing"):
        fit(Net(), Task("a", {"train": DataLoader(Client(), 64), "val": loader()}, classes=[0, 1]))
    with pytest.warns(DataWarning, match=r"cannot be copied, and two looks at its first batch gave different ones"):
        fit(Net(), Task("a", {"train": DataLoader(Client(), 8), "val": loader()}, classes=[0, 1]))


# What passes change


class FillsCache(IterableDataset):
    """Its first whole pass fills a cache."""

    def __init__(self):
        self.samples, self.cache, self.full = list(stream()), [], False

    def __iter__(self):
        if self.full:
            yield from self.cache
            return
        for sample in self.samples:
            self.cache.append(sample)
            yield sample
        self.full = True


class Curriculum(IterableDataset):
    """Gives more in each pass."""

    def __init__(self):
        self.samples, self.passes = list(stream()), 0

    def __iter__(self):
        self.passes += 1
        yield from self.samples[: 16 * self.passes]


class SetEpoch(torch.utils.data.Sampler):
    """Draws an order by the epoch that it is told."""

    epoch = None

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return 64

    def __iter__(self):
        yield from torch.randperm(64, generator=torch.Generator().manual_seed(7 + self.epoch)).tolist()


class Seen(Net):
    def __init__(self):
        super().__init__()
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch[0].tolist())
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    "source",
    [
        lambda: DataLoader(FillsCache(), 8),
        lambda: DataLoader(Curriculum(), 8),
        lambda: DataLoader(ChainDataset([Curriculum()]), 8),
        lambda: DataLoader(Shuffled(), 8),
        lambda: DataLoader(TensorDataset(*numbers()), 8, sampler=SetEpoch()),
        lambda: DataLoader(TensorDataset(*numbers()), batch_sampler=BatchSampler(SetEpoch(), 8, False)),
    ],
    ids=["cache", "curriculum", "chained", "generator", "epochs", "epochs of batches"],
)
@pytest.mark.parametrize("stage", ["train", "val"])
def test_a_fit_trains_on_the_same_batches_as_plain_lightning(source, stage):
    found = []
    for callbacks in ([], None):
        net, data = Seen(), source()
        net.validation_step = lambda batch, *_, net=net: net.seen.append(batch[0].tolist())
        fit(
            net,
            Task("a", {"train": loader(), "val": loader()} | {stage: data}, classes=[0, 1]),
            callbacks,
            max_epochs=3,
        )
        found.append(net.seen)
    assert found[0] == found[1]


class DrawsForEver(GoesOn):
    """Gives itself too, but no batch hangs on those before."""

    def __init__(self):
        self.given = 0

    def __next__(self):
        self.given += 1
        return numbers(16, seed=int(torch.randint(99, ())))

    __len__ = None


class CountsPasses(Caches):
    """Keeps something of each pass, on which no length hangs."""

    def __iter__(self):
        self.cache.append(len(self.cache))
        yield from self.held


class Again(IterableDataset):
    """Begins anew with each iter(), though it is its own iterator."""

    def __init__(self):
        self.samples, self.left, self.ids = list(stream()), iter(()), itertools.count()

    def __iter__(self):
        self.left = iter(self.samples)
        return self

    def __next__(self):
        next(self.ids)
        return next(self.left)


class Shuffled(IterableDataset):
    def __init__(self, seed=0):
        self.samples, self.random = list(stream()), np.random.default_rng(seed)

    def __iter__(self):
        yield from (self.samples[i] for i in self.random.permutation(64))


class Drawn(Shuffled):
    def __iter__(self):
        yield from (self.samples[i] for i in torch.randperm(64))


class Batches:
    """No loader of torch's."""

    def __iter__(self):
        yield from batches()


@pytest.mark.parametrize(
    "source",
    [
        lambda: DataLoader(Again(), 8),
        lambda: DataLoader(Shuffled(), 8),
        lambda: DataLoader(Drawn(), 8),
        lambda: DataLoader(Counted(64), 8),
        lambda: DataLoader(Yields(list(stream())), 8),
        Batches,
        lambda: DataLoader(CountsPasses(stream()), 8),
        lambda: DataLoader(Prepares(), 8),
        lambda: DataLoader(Locked(), 8),
        lambda: DataLoader(ChainDataset([Locked()]), 8),
        lambda: DataLoader(Noted(), 8),
        lambda: DataLoader(Pool(1), 8),
        lambda: DataLoader(ChainDataset([Pool(1)]), 8),
        lambda: DataLoader(Selects(), 8),
        lambda: DataLoader(Counts(), 8),
    ],
    ids=[
        "its own iterator",
        "generator",
        "global generator",
        "counted",
        "list",
        "iterable",
        "counts passes",
        "queue",
        "locked",
        "chained",
        "a queue beside",
        "a pool",
        "a chained pool",
        "executes",
        "counts",
    ],
)
def test_what_begins_anew_trains_as_many_steps_as_plain_lightning(source):
    plain, net = Net(), Net()
    fit(plain, Task("a", {"train": source(), "val": loader()}, classes=[0, 1]), [], max_epochs=2)
    for _ in range(2):
        fit(net, Task("a", {"train": source(), "val": loader()}, classes=[0, 1]), max_epochs=1)
    assert net.steps == plain.steps > 0


# Limits


@pytest.mark.parametrize(
    "options",
    [
        {"limit_train_batches": 2, "limit_val_batches": 2},
        {"max_steps": 2, "max_epochs": -1, "limit_val_batches": 2},
        {"fast_dev_run": 2},
    ],
    ids=["limits", "max_steps", "fast_dev_run"],
)
def test_data_without_end_are_read_as_far_as_the_trainer_does(options):
    train, val = Counted(), Counted()
    net = Net()
    task = Task("a", {"train": DataLoader(train, 16), "val": DataLoader(val, 16)}, classes=[0, 1])
    fit(net, task, **options)
    assert net.steps == 2
    assert len(state_of(net).ledger.tasks) == 1
    assert train.read <= 32 * 5  # the fit's own, and at each place two batches at most
    assert val.read % 16 == 0


def test_an_endless_iterator_that_draws_its_batches_is_no_stream():
    net = Net()
    fit(net, Task("a", {"train": DrawsForEver(), "val": loader()}, classes=[0, 1]), limit_train_batches=3)
    assert net.steps == 3


def test_one_reading_is_two_batches():
    data = Counted()
    task = Task("a", {"train": DataLoader(data, 16), "val": DataLoader(data, 16)}, classes=[0, 1])
    task.task_loaders.limits = Limits(train=2, val=2)
    for reading in (task.task_loaders.training(), task.judging_batches()):
        data.read = 0
        assert len(list(reading)) == 2
        assert data.read == 32


def test_training_data_without_end_that_judge_are_read_up_to_a_bound(monkeypatch):
    monkeypatch.setattr("lightning_cf.tasks.reading.WITHOUT_LENGTH", 64)
    task = Task("a", {"train": DataLoader(Counted(), 16)}, classes=[0, 1])
    with pytest.warns(DataWarning, match=r"may have no end: read up to 64 samples.*limit_val_batches") as told:
        assert [sum(len(y) for _, y in task.judging_batches()) for _ in range(2)] == [64, 64]
    assert len(told) == 1


class Drawn10e9(torch.utils.data.Dataset):
    """Draws a sample for each number below its length, as data sets of made-up samples do."""

    def __init__(self):
        self.read, self.data = 0, numbers()

    def __len__(self):
        return 10**9

    def __getitem__(self, at):
        self.read += 1
        return self.data[0][at % 64], self.data[1][at % 64]


def test_a_data_set_of_any_length_is_read_as_far_as_steps_take(monkeypatch):
    monkeypatch.setattr("lightning_cf.tasks.reading.WITHOUT_LENGTH", 64)
    data = Drawn10e9()
    task = Task("a", {"train": DataLoader(data, 16), "val": loader()}, classes=[0, 1])
    for batches, read in [(2, 64), (8, 128)]:
        task.task_loaders.limits, data.read = Limits(batches=batches), 0
        assert sum(len(y) for _, y in task.task_loaders.training()) == read == data.read
    net = Net()
    fit(net, task, max_steps=3)
    assert net.steps == 3


@pytest.mark.parametrize(
    ("limits", "read"),
    [
        (Limits(), 4),
        (Limits(val=2), 2),
        (Limits(val=0.5), 2),
        (Limits(val=0), 4),
        (Limits(val=0.0), 4),
        (Limits(val=9), 4),
        (Limits(train=1, batches=1), 4),
    ],
)
def test_a_share_is_of_the_loaders_length(limits, read):
    task = Task("a", {"train": loader(), "val": loader()}, classes=[0, 1])
    task.task_loaders.limits = limits
    assert len(list(task.judging_batches())) == read


def test_the_runner_scores_within_the_limits(tmp_path):
    class Seen(TensorDataset):
        read = 0

        def __getitem__(self, index):
            Seen.read += 1
            return super().__getitem__(index)

    tests = DataLoader(Seen(*numbers(640)), 16)
    task = Task("a", {"train": loader(), "val": loader(), "test": tests}, classes=[0, 1])
    trainer = partial(quiet_trainer, limit_test_batches=2, limit_train_batches=2, limit_val_batches=1)
    run = SequentialTaskRunner(Net(), [task], trainer=trainer, epochs=1, invariance_epochs=1, root=tmp_path)
    run.start()
    Seen.read = 0
    assert 0 <= run.score_of(task) <= 1
    assert Seen.read == 32


# Loaders are opened as often as Lightning opens them


class Opens(LightningDataModule):
    def __init__(self, setup=True):
        super().__init__()
        self.opened = {"train": 0, "val": 0}

    def train_dataloader(self):
        self.opened["train"] += 1
        return loader(shuffle=True)

    def val_dataloader(self):
        self.opened["val"] += 1
        return loader()


class SetUp(Opens):
    def setup(self, stage):
        self.opened["setup"] = self.opened.get("setup", 0) + 1


@pytest.mark.parametrize("kind", [Opens, SetUp])
@pytest.mark.parametrize("options", [{}, {"reload_dataloaders_every_n_epochs": 1}, {"num_sanity_val_steps": 0}])
def test_loaders_are_opened_as_often_as_by_lightning(kind, options):
    plain, ours = kind(), kind()
    fit(Net(), plain, [], max_epochs=2, **options)
    task = Task("a", ours, classes=[0, 1])
    fit(Net(), task, [*three_and_inference()], max_epochs=2, **options)
    assert ours.opened == plain.opened


def three_and_inference():
    from lightning_cf import InvarianceCallback, MaskedGradientCallback, PartitionCallback

    return [PartitionCallback(after=0.5), InvarianceCallback(), MaskedGradientCallback(), TaskInferenceCallback()]


def test_the_runner_opens_them_once_a_fit(tmp_path):
    data = Opens()
    run = SequentialTaskRunner(
        Net(), [Task("a", data, classes=[0, 1])], trainer=quiet_trainer, epochs=1, invariance_epochs=1, root=tmp_path
    )
    run.run()
    assert data.opened == {"train": 2, "val": 2}


def test_a_loader_is_not_the_old_one_after_its_data_changed():
    class Sized(Opens):
        batch_size = 4

        def train_dataloader(self):
            return loader(batch_size=self.batch_size)

    task = Task("a", Sized(), classes=[0, 1])
    task.check_data()
    task.batch_size = 8
    assert task.train_dataloader().batch_size == 8


def test_reading_in_the_middle_of_a_pass_leaves_it_and_its_generator_alone():
    generator = torch.Generator().manual_seed(0)
    data = loader(shuffle=True, generator=generator)
    expected = [y.tolist() for _, y in data]
    generator.manual_seed(0)
    task = Task("a", {"train": data, "val": loader()}, classes=[0, 1])
    task.check_data()
    seen = []
    for _, y in task.train_dataloader():
        seen.append(y.tolist())
        list(task.task_loaders.training())
    assert seen == expected


@pytest.mark.slow
def test_workers_that_persist_are_not_reset_in_the_middle_of_a_pass():
    data = loader(num_workers=1, persistent_workers=True)
    task = Task("a", {"train": data, "val": loader()}, classes=[0, 1])
    seen = 0
    for _ in task.train_dataloader():
        seen += 1
        next(iter(task.task_loaders.training()))
    assert seen == 4


# Several training loaders


class Several(Net):
    """Steps over what any of the loaders gave."""

    def training_step(self, batch, batch_idx):
        self.steps += 1
        pairs = batch.values() if isinstance(batch, dict) else batch
        pairs = [batch] if isinstance(batch[0] if not isinstance(batch, dict) else None, torch.Tensor) else pairs
        return sum(self.loss(self(pair[0]), pair[1]) for pair in pairs if isinstance(pair, (list, tuple)))


def unlabelled():
    return DataLoader(numbers()[0], 16)


SEVERAL = {
    "dict": lambda: {"one": loader(), "two": loader(shuffle=True)},
    "list": lambda: [loader(), loader()],
    "unlabelled": lambda: {"one": loader(), "rest": unlabelled()},
    "min_size": lambda: CombinedLoader({"one": loader(), "two": loader(32)}, "min_size"),
    "cycle": lambda: CombinedLoader([loader(), loader(32)], "max_size_cycle"),
}


@pytest.mark.parametrize("kind", SEVERAL)
def test_several_training_loaders_train_as_in_plain_lightning(kind):
    net, plain = Several(), Several()
    fit(plain, Task("a", {"train": SEVERAL[kind](), "val": loader()}, classes=[0, 1]), [])
    fit(net, Task("a", {"train": SEVERAL[kind](), "val": loader()}, classes=[0, 1]), three_and_inference())
    assert net.steps == plain.steps > 0
    assert [owned.name for owned in state_of(net).ledger.tasks] == ["a"]


def test_several_training_loaders_without_validation_judge_themselves():
    net = Several()
    with pytest.warns(DataWarning, match="of its training data can be held out: its batches come from several loaders"):
        fit(net, Task("a", {"train": {"one": loader(), "two": loader()}}, classes=[0, 1]))
    assert net.steps == 4


def test_batches_of_several_loaders_go_to_evaluate_where_it_takes_them():
    data = {"train": {"one": loader(), "two": loader()}}
    task = Task("a", data, classes=[0, 1], evaluate=lambda module, batch: (module(batch["one"][0]), batch["one"][1]))
    with pytest.warns(DataWarning, match="held out"):
        fit(Several(), task)
    assert task.task_loaders.batches == "whole"


def test_an_evaluate_for_plain_batches_gets_pairs():
    data = {"train": {"one": loader(), "two": loader()}, "val": loader()}
    task = Task("a", data, classes=[0, 1], evaluate=lambda module, batch: (module(batch[0]), batch[1]))
    fit(Several(), task)
    assert task.task_loaders.batches == "pairs"


def test_training_batches_that_nothing_scores_are_refused():
    task = Task("a", {"train": {"one": unlabelled(), "two": unlabelled()}}, classes=[0, 1], holdout=0.0)
    with pytest.raises(ContinualError, match="its training batches hold batches of several loaders"):
        fit(Several(), task)


@pytest.mark.parametrize("classes", [np.unique([1, 0, 1]), torch.tensor([1, 0]).unique(), np.array([0, 1], dtype="u1")])
def test_classes_are_taken_from_arrays_and_tensors(classes):
    task = Task("a", {"train": loader()}, classes=classes, outputs=classes)
    assert task.classes == task.outputs == [0, 1]
    assert {type(label) for label in task.classes} == {int}


def test_classes_of_a_series():
    pandas = pytest.importorskip("pandas")
    assert Task("a", {"train": loader()}, classes=pandas.Series([3, 1, 3]).unique()).classes == [3, 1]
    assert Task("a", {"train": loader()}, classes=pandas.Series([3, 1])).classes == [3, 1]


@pytest.mark.parametrize("copied", [copy.deepcopy])
def test_a_task_that_was_read_is_copied(copied):
    task = Task("a", Opens(), classes=[0, 1])
    task.check_data()
    assert copied(task).check_data()[1].tolist() is not None
    assert copied(task).task_loaders.task is not task


# Datamodules as they are


class Holding(LightningDataModule):
    """Holds its data from setup to teardown only, and asks its Trainer for the batch size."""

    def setup(self, stage):
        setattr(self, "train" if stage == "fit" else "test", numbers())

    def teardown(self, stage):
        del self.train

    def train_dataloader(self):
        return DataLoader(TensorDataset(*self.train), 16 // self.trainer.accumulate_grad_batches)

    def test_dataloader(self):
        return DataLoader(TensorDataset(*self.test), 16 // self.trainer.world_size)


def test_a_runner_reads_data_between_fits_as_a_trainer_would(tmp_path):
    tasks = [Task("a", Holding(), classes=[0, 1]), Task("b", {"train": loader(classes=(2, 3))}, classes=[2, 3])]
    run = SequentialTaskRunner(
        Net(), tasks, trainer=quiet_trainer, epochs=1, invariance_epochs=1, task_inference=None, root=tmp_path
    )
    assert len(run.run().accuracy.rows) == 3
    assert tasks[0].data.trainer is run.host


@pytest.mark.parametrize(
    ("stages", "found"),
    [
        ({"val": [loader(), None]}, "its val_dataloader\\(\\) gives several loaders, one of which is None"),
        ({"val": {"x": None}}, "its val_dataloader\\(\\) gives several loaders, one of which is None"),
        ({"train": {"x": None, "y": loader()}}, "its train_dataloader\\(\\) gives several loaders"),
    ],
)
def test_none_in_place_of_a_loader_is_named(stages, found):
    with pytest.raises(ContinualError, match=f"Task 'a': {found}"):
        fit(Net(), Task("a", {"train": loader()} | stages, classes=[0, 1]))


def test_a_validation_loader_without_samples_is_told():
    nothing = DataLoader(TensorDataset(*(x[:0] for x in numbers(16))), batch_size=8)
    with pytest.raises(
        ContinualError, match=r"Task 'a': no batch came of .* validation or test loader that has samples"
    ):
        fit(Net(), Task("a", {"train": loader(), "val": nothing}, classes=[0, 1]))


@pytest.mark.parametrize("none", [{}, [], ()])
def test_no_validation_loaders_are_no_validation(none):
    task = Task("a", {"train": loader(), "val": none}, classes=[0, 1])
    assert fit(Net(), task).steps == 4
    assert not task.has_validation


def test_a_loader_that_fails_leaves_the_classes_of_torch_as_they_were():
    class Data(LightningDataModule):
        def train_dataloader(self):
            return DataLoader(TensorDataset(*numbers(16)), 4)

        def test_dataloader(self):
            raise ZeroDivisionError

    before = {kind: (kind.__init__, kind.__setattr__) for kind in (DataLoader, BatchSampler)}
    task = Task("a", Data(), classes=[0, 1])
    with pytest.raises(ZeroDivisionError):
        task.task_loaders.given("test")
    assert {kind: (kind.__init__, kind.__setattr__) for kind in before} == before
