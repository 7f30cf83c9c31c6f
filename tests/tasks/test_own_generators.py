"""Generators that data hold themselves begin anew with each phase, wherever they are held."""

import random
import weakref
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from runs import data, net, run_of
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset

from lightning_cf import Task
from lightning_cf.tasks.own_generators import OwnGenerators

KINDS = {
    "torch": (lambda: torch.Generator().manual_seed(1), lambda g: torch.rand(3, generator=g).tolist()),
    "numpy": (lambda: np.random.default_rng(1), lambda g: g.random(3).tolist()),
    "numpy's legacy": (lambda: np.random.RandomState(1), lambda g: g.rand(3).tolist()),
    "Python": (lambda: random.Random(1), lambda g: [g.random() for _ in range(3)]),
}


class Noisy(Dataset):
    """Adds noise of its own to each sample."""

    def __init__(self, samples, generator):
        self.samples, self.generator = samples, generator

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        x, y = self.samples[index]
        return x + torch.tensor(self.generator.random(6), dtype=torch.float32), y


class Data(LightningDataModule):
    def __init__(self, held):
        super().__init__()
        self.held = held


def closed_over(held):
    return lambda x: (held, x)


class Augmented(nn.Module):
    """A transform that is a module, as those of torchvision are, in a row of them."""

    def __init__(self, held):
        super().__init__()
        self._held = held


PLACES = {
    "a row of modules": lambda g: nn.Sequential(nn.Identity(), Augmented(g)),
    "itself": lambda g: g,
    "a data module": Data,
    "a dictionary of lists": lambda g: {"train": [1, (g,)]},
    "a partial function": lambda g: partial(max, g),
    "a closure": closed_over,
    "a method": lambda g: Noisy([], g).__getitem__,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", PLACES)
def test_what_is_drawn_depends_on_the_seed_and_the_key_alone(kind, place):
    make, draw = KINDS[kind]
    one, other = make(), make()
    own, again = OwnGenerators([PLACES[place](one)]), OwnGenerators([PLACES[place](other)])
    found = []
    for key in ("a", "b", "a"):
        with own.seeded(key):
            found.append(draw(one))
    with again.seeded("b"):
        assert draw(other) == found[1]
    assert found[0] == found[2] != found[1]
    assert draw(one) == draw(make())  # afterwards it is as it was


GLOBAL = [torch.default_generator, np.random.mtrand._rand, random._inst]


@pytest.mark.parametrize("held", [*GLOBAL, [*range(1000), random.Random(1)]])
def test_global_generators_and_long_lists_are_left_alone(held):
    before = random.getstate(), torch.get_rng_state()
    with OwnGenerators([{"held": held}]).seeded("a"):
        assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])


class Raising:
    @property
    def __dict__(self):
        raise RuntimeError("nothing to see")


class Loading(dict):
    def values(self):
        raise RuntimeError("would load everything")


class Endless(list):
    def __iter__(self):
        raise RuntimeError("would load everything")


class Own(random.Random):
    def getstate(self):
        raise NotImplementedError


def gone():
    return weakref.proxy(Noisy([], None))


ODD = {
    "the system's": random.SystemRandom,
    "numpy's legacy over another": lambda: np.random.RandomState(np.random.PCG64(1)),
    "raising": Raising,
    "loading": lambda: Loading(a=1),
    "endless": lambda: Endless([1]),
    "its own": Own,
    "gone": gone,
}


@pytest.mark.parametrize("odd", ODD)
def test_what_cannot_be_looked_at_or_seeded_is_left_alone(odd):
    generator = random.Random(1)
    with OwnGenerators([{"held": ODD[odd](), "beside": generator}]).seeded("a"):
        found = generator.random()
    assert found != generator.random() == random.Random(1).random()


class Stop(Callback):
    def __init__(self, at):
        self.left = at

    def on_train_batch_end(self, *_):
        Stop.count += 1
        if Stop.count == self.left:
            raise RuntimeError("stopped")

    count = 0


def shuffled(classes, kind):
    sets = data(classes)["train"].dataset
    g = torch.Generator().manual_seed(1)
    train = {
        "loader": lambda: DataLoader(sets, 10, shuffle=True, generator=g),
        "sampler": lambda: DataLoader(sets, 10, sampler=RandomSampler(sets, generator=g)),
        "data set": lambda: DataLoader(Noisy(sets, np.random.default_rng(1)), 10),
    }[kind]()
    judging = DataLoader(TensorDataset(*sets.tensors), 40)
    return Task(str(classes), {"train": train, "val": judging, "test": judging}, classes=classes)


@pytest.mark.filterwarnings("ignore:.*no claim within", "ignore:.*was not learned")
@pytest.mark.parametrize("kind", ["loader", "sampler", "data set"])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(kind, tmp_path):
    def run(folder, at):
        Stop.count, module = 0, net()
        tasks = [shuffled(classes, kind) for classes in ([0, 1], [2, 3])]
        run_of(tmp_path / folder, module=module, sequence=tasks, callbacks=[Stop(at)]).run()
        return dict(module.named_parameters())

    whole = run("whole", 10**6)
    with pytest.raises(RuntimeError, match="stopped"):
        run("parts", 7)
    assert all(torch.equal(value, whole[name]) for name, value in run("parts", 10**6).items())
