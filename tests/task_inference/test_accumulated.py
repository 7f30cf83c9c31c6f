"""Classifiers in closed form, from sums that tasks add up: exact sums, and what is solved from them."""

from functools import reduce
from operator import add

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge
from torchmetrics.functional.classification import binary_auroc

from lightning_cf import ContinualError
from lightning_cf.task_inference import Readout, Sites
from lightning_cf.task_inference.accumulated import Accumulated, Sums
from lightning_cf.task_inference.accumulated.closed_form import Familiarity, Separation, discriminant, ridge
from lightning_cf.task_inference.accumulated.sums import LARGEST, STEP, packed, products, rounded, unpacked
from lightning_cf.task_inference.features import Custom

CLASSES = 6


def sums_of(x, y):
    """The sums of some samples, as a task adds them."""
    totals = torch.zeros(CLASSES, x.shape[1], dtype=torch.float64).index_add_(0, y, x.double())
    return Sums.of(products(x), totals, y.bincount(minlength=CLASSES))


def same(a, b):
    return a.classes == b.classes and all(torch.equal(packed(a)[name], packed(b)[name]) for name in packed(a))


def samples(seed=0, count=300, features=12, classes=CLASSES, spread=2.0, noise=1.0):
    """Rounded features of clouds around a centre a class, and their classes."""
    g = torch.Generator().manual_seed(seed)
    centres = spread * torch.randn(CLASSES, features, generator=torch.Generator().manual_seed(99))
    y = torch.arange(count) % classes
    return rounded(centres[y] + noise * torch.randn(count, features, generator=g)), y


@given(st.data())
def test_sums_are_those_of_whole_numbers_however_the_samples_come(data):
    count, features = data.draw(st.integers(1, 3000)), data.draw(st.integers(1, 6))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    x = torch.randint(-LARGEST, LARGEST + 1, (count, features), generator=g).float()
    y = torch.randint(CLASSES, (count,), generator=g)
    whole = sums_of(x, y)
    rows, columns = torch.triu_indices(features, features)
    assert torch.equal(whole.gram, (x.long().T @ x.long())[rows, columns])
    for label, sums, number in zip(whole.classes, whole.totals, whole.counts, strict=True):
        assert torch.equal(sums, x.long()[y == label].sum(dim=0))
        assert number == (y == label).sum()
    order = torch.randperm(count, generator=g)
    parts = order.tensor_split(sorted(data.draw(st.lists(st.integers(1, count), max_size=4))))
    found = [sums_of(x[part], y[part]) for part in parts if len(part)]
    assert same(reduce(add, found), whole)
    assert same(reduce(add, found[::-1]), whole)
    assert same(unpacked(packed(whole)), whole)


@given(st.integers(0, 1000))
def test_what_is_subtracted_was_never_there(seed):
    (x, y), (other, of) = samples(seed), samples(seed + 1, count=97, classes=4)
    both = sums_of(x, y) + sums_of(other, of)
    assert same(both - sums_of(other, of), sums_of(x, y))
    alone = both - sums_of(x, y)
    assert same(alone, sums_of(other, of))
    assert alone.classes == [0, 1, 2, 3]  # classes without a sample are gone


def test_rounding_takes_what_lies_far_to_the_last_step():
    x = torch.tensor([[1e9, -1e9, 0.031, 0.0]])
    assert rounded(x).tolist() == [[LARGEST, -LARGEST, 0, 0]]


@pytest.mark.parametrize("shrinkage", [0.01, 0.3])
def test_the_discriminant_is_that_of_scikit_learn(shrinkage):
    (x, y), (other, _) = samples(), samples(1)
    linear = discriminant(Separation.of(sums_of(x, y), shrinkage))
    share = shrinkage / (1 + shrinkage)  # of the identity in a mixture; ours adds it
    peer = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=share, priors=[1 / CLASSES] * CLASSES)
    peer.fit((x * STEP).double().numpy(), y.numpy())
    theirs = torch.from_numpy(peer.decision_function((other * STEP).double().numpy())) / (1 + shrinkage)
    ours = linear(other).double()
    torch.testing.assert_close(
        ours - ours.mean(1, keepdim=True), theirs - theirs.mean(1, keepdim=True), rtol=1e-3, atol=1e-3
    )


def test_ridge_is_that_of_scikit_learn_where_classes_are_of_one_size():
    (x, y), (other, _) = samples(), samples(1)
    linear = ridge(sums_of(x, y), 0.1)
    values = (x * STEP).double()
    size = values.var(dim=0, correction=0).mean()
    peer = Ridge(alpha=float(0.1 * size * len(x))).fit(values.numpy(), torch.nn.functional.one_hot(y).double().numpy())
    theirs = torch.from_numpy(peer.predict((other * STEP).double().numpy()))
    torch.testing.assert_close(linear(other).double(), theirs, rtol=1e-3, atol=1e-4)


def test_familiarity_holds_the_difference_of_two_distances():
    (x, y), (other, _) = samples(), samples(1)
    sums, shrinkage = sums_of(x, y), 0.05
    solved = Separation.of(sums, shrinkage)
    found = Familiarity.of(solved)
    values, seen = (x * STEP).double(), (other * STEP).double()
    means = torch.stack([values[y == label].mean(dim=0) for label in range(CLASSES)])
    within = (values - means[y]).T @ (values - means[y]) / len(values)
    shrunk = within + shrinkage * within.diagonal().mean() * torch.eye(len(within))
    mean = values.mean(dim=0)
    between = (means - mean).T @ (means - mean) / CLASSES

    def distance(covariance, centre):
        return ((seen - centre) @ torch.linalg.inv(covariance) * (seen - centre)).sum(dim=1)

    nearest = torch.stack([distance(shrunk, centre) for centre in means]).amin(dim=0)
    expected = distance(shrunk + between, mean) - nearest
    outputs = discriminant(solved)(other)
    best = outputs.argmax(dim=1)
    middle, deviation = found.middle[:, best], found.deviation[:, best]
    deviations = (torch.stack([outputs.amax(dim=1), expected.float()]) - middle) / deviation
    torch.testing.assert_close(found(outputs), deviations.amin(dim=0).float(), rtol=1e-3, atol=1e-2)
    assert 0.1 < float((deviations[0] < deviations[1]).float().mean()) < 0.9  # either is asked


def test_further_samples_are_as_familiar_as_expected_and_others_are_not():
    (x, y), (other, _) = samples(classes=4), samples(1, classes=4)
    sums = sums_of(x, y)
    solved = Separation.of(sums, 0.03)
    linear, familiarity = discriminant(solved), Familiarity.of(solved)
    known, strange = familiarity(linear(other)), familiarity(linear(samples(2, count=600)[0][4::6]))
    assert -0.9 < float(known.mean()) < 0.1  # -0.53 to -0.35 over ten seeds: the lower of two
    assert 0.6 < float(known.std()) < 1.3  # 0.82 to 1.06
    told = binary_auroc(torch.cat([known, strange]), (torch.arange(len(known) + len(strange)) < len(known)).long())
    assert float(told) > 0.99  # 0.9998 to 1


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.05, 0.2])
@pytest.mark.parametrize("features", [12, 60])
def test_samples_of_classes_that_lie_far_apart_stay_familiar(noise, features):
    (x, y), (other, _) = (samples(seed, features=features, noise=noise) for seed in (0, 1))
    solved = Separation.of(sums_of(x, y), 0.03)
    linear, familiarity = discriminant(solved), Familiarity.of(solved)
    known = familiarity(linear(torch.cat([x, other])))
    assert float(known.min()) > -14  # -7 to 0 over six seeds
    alone = torch.cat([familiarity(linear(part)) for part in torch.cat([x, other]).split(1)])
    torch.testing.assert_close(alone, known, rtol=0, atol=0.5)  # however the rounding of a batch comes out


def test_wrong_options_are_refused():
    with pytest.raises(ContinualError, match="mine: form must be one of lda, ridge, got 'qda'"):
        Accumulated("mine", form="qda")
    with pytest.raises(ContinualError, match="mine: shrinkage must be a finite number above 0"):
        Accumulated("mine", shrinkage=0.0)


def test_what_features_find_of_a_batch_is_found_once_and_not_carried_over_to_a_part_of_it():
    calls = []

    def counted(x):
        calls.append(len(x))
        return x

    strategy = Accumulated("counted", features=Custom(counted))
    x, y = torch.randn(40, 5, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 2
    looks = Sites(None, (), {}, torch.arange(2))
    seen = Readout(None, {}, torch.zeros(40, 2), {}, x=x)
    shared = strategy.begin(seen, looks, torch.Generator(), 10_000)
    shared = strategy.close(strategy.add(shared, seen, looks, y))
    before = len(calls)
    other = strategy.subtract(shared, strategy.added(shared, strategy.add(shared, seen.part(y == 0), looks, y[y == 0])))
    assert calls[before:] == [20]
    columns = torch.arange(2)
    outputs = [strategy.outputs(kept, seen, looks, columns) for kept in (shared, other)]
    assert len(calls) == before + 1
    assert bool(outputs[1][:, 0].isneginf().all())
    moved = {**shared, "centre": shared["centre"] + 1.0}
    assert not torch.equal(strategy.outputs(moved, seen, looks, columns), outputs[0])
    assert calls[before + 1 :] == [40]
