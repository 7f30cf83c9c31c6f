"""Features that never change: what is kept of an input's kind, and how large inputs are made small."""

import pytest
import torch

from lightning_cf import ContinualError
from lightning_cf.task_inference import Readout, Sites
from lightning_cf.task_inference.batches import joined
from lightning_cf.task_inference.features import patches
from lightning_cf.task_inference.features.base import Values
from lightning_cf.task_inference.features.by_medium import IMAGES, TOKENS, UNITS, VALUES, by_medium, medium_of
from lightning_cf.task_inference.features.random_layer import READ, RandomFeatures, folded

SITES = Sites(None, (), {}, torch.empty(0, dtype=torch.long))


def seen(x, count=4, outputs=10, **options):
    return Readout(None, {}, torch.zeros(count, outputs), {}, x=x, **options)


@pytest.mark.parametrize(
    ("x", "kind"),
    [
        (None, UNITS),
        (torch.zeros(4, 7, dtype=torch.long), TOKENS),
        (torch.zeros(4, 7, dtype=torch.bool), VALUES),
        (torch.zeros(4, 7, dtype=torch.complex64), VALUES),
        (torch.zeros(4, 3, 8, 8), IMAGES),
        (torch.zeros(4, 3, 8, 8, dtype=torch.uint8), VALUES),
        (torch.zeros(4, 3, 2, 8), VALUES),
        (torch.zeros(4), VALUES),
        ((torch.zeros(4, 7), torch.zeros(4)), VALUES),
    ],
)
def test_the_kind_of_an_input_is_found_once(x, kind):
    assert int(medium_of(seen(x), 10_000)[0]) == kind


def test_features_do_not_hang_on_how_many_outputs_there_are_later():
    x = torch.rand(4, 7)
    features = by_medium(medium_of(seen(x), 10_000))
    kept = features.begin(seen(x), SITES, torch.Generator())
    a, b = features.of(kept, seen(x), SITES), features.of(kept, seen(x, outputs=30), SITES)
    assert torch.equal(a, b)


def test_of_batches_whose_samples_are_longer_those_like_the_first_are_joined():
    parts = [seen(torch.rand(4, length, 2)) for length in (3, 5, 3)]
    found = joined(parts)
    assert found.ragged == (1,)
    assert torch.equal(found.x, torch.cat([parts[0].x, parts[2].x]))
    assert len(found.outputs) == 8
    values = by_medium(medium_of(found, 10_000)).behind
    assert values.of({}, parts[0], SITES).shape == values.of({}, parts[1], SITES).shape
    both = joined([seen(torch.rand(4, n, m)) for n, m in ((3, 2), (5, 4))])
    with pytest.raises(ContinualError, match="other sizes"):
        medium_of(both, 10_000)
    assert joined([parts[0], seen(None)]).x is None


def test_many_values_are_folded_with_signs_and_few_are_as_they_are():
    rows = torch.rand(3, READ)
    assert folded(rows, 0) is rows
    rows = torch.randn(64, 3 * READ - 5, generator=torch.Generator().manual_seed(0))
    found = folded(rows, 0)
    assert found.shape == (64, READ)
    assert not torch.equal(found, folded(rows, 1))
    before, after = torch.cdist(rows, rows), torch.cdist(found, found) * 3**0.5
    apart = ~torch.eye(64, dtype=torch.bool)
    assert float((after / before)[apart].sub(1).abs().max()) < 0.05  # distances stay
    kept = RandomFeatures(8).begin(seen(rows, 64), SITES, torch.Generator())
    assert kept["centre"].shape == (READ,)


def test_matches_of_large_images_are_computed_in_parts(monkeypatch):
    x = torch.rand(9, 3, 20, 16)
    bank = patches.PatchBank(5)
    kept = bank.begin(seen(x, 9), SITES, torch.Generator().manual_seed(0))
    whole = bank.of(kept, seen(x, 9), SITES)
    monkeypatch.setattr(patches, "AT_ONCE", 2 * 2 * 5 * 20 * 16)
    torch.testing.assert_close(bank.of(kept, seen(x, 9), SITES), whole)
    assert bank.of(kept, seen(x[:0], 0), SITES).shape == (0, whole.shape[1])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_no_number_counts_as_nothing(value):
    x = torch.ones(2, 3)
    x[0, 1] = value
    assert Values().of({}, seen(x, 2), SITES).tolist() == [[1, 0, 1], [1, 1, 1]]
