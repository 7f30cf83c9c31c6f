"""Features that no later task changes: of patches, random layers, runs of tokens, units of the first task."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from lightning_cf import ContinualError, ContinualWarning
from lightning_cf.task_inference.accumulated import Accumulated
from lightning_cf.task_inference.features import (
    Custom,
    FirstUnits,
    HashedNgrams,
    PatchBank,
    Pretrained,
    RandomFeatures,
    Values,
    by_medium,
)
from lightning_cf.task_inference.features.base import moments
from lightning_cf.task_inference.features.by_medium import medium_of
from lightning_cf.task_inference.features.patches import NOISE
from lightning_cf.task_inference.readout import Readout
from lightning_cf.task_inference.sites import Site, Sites


def test_a_value_that_is_not_finite_counts_as_the_mean_of_its_feature():
    x = torch.rand(40, 5, generator=generator())
    x[3, 1], x[4, 1], x[7, 2] = torch.nan, torch.inf, -torch.inf
    mine, behind = Accumulated("mine", features=Custom(lambda x: x)), RandomFeatures(20, Custom(lambda x: x))
    with pytest.warns(ContinualWarning, match=r"mine: 3 of 200 values of features are not finite"):
        kept = mine.begin(seen(x), nowhere(), generator(), 10**6)
    fine = x[:, 1][x[:, 1].isfinite()]
    torch.testing.assert_close(kept["centre"][1], fine.mean())
    torch.testing.assert_close(kept["scale"][1], fine.std(correction=0))
    fixed = behind.begin(seen(x), nowhere(), generator())
    centred = torch.where(x.isfinite(), x, fixed["centre"])
    assert torch.equal(behind.of(fixed, seen(x), nowhere()), behind.of(fixed, seen(centred), nowhere()))


def test_moments_of_what_is_finite_are_those_of_the_whole():
    rows = torch.randn(50, 4, generator=generator())
    spoiled = torch.cat([rows, torch.full((1, 4), torch.nan)])
    for found, expected in zip(moments(spoiled), moments(rows), strict=True):
        torch.testing.assert_close(found, expected)
    assert torch.equal(moments(rows)[0], rows.mean(dim=0))


def test_patches_of_one_value_are_refused():
    with pytest.raises(ContinualError, match="PatchBank: size must be a whole number of at least 2, got 1"):
        PatchBank(8, size=1)
    with pytest.raises(ContinualError, match="patches of images of 1 x 5 pixels are single values"):
        PatchBank(8).begin(seen(torch.rand(4, 1, 1, 5)), nowhere(), generator())


def test_features_that_are_given_take_no_budget():
    with pytest.raises(ContinualError, match="mine: budget says how many features to choose, and features= were given"):
        Accumulated("mine", features=PatchBank(8), budget=2000)


@given(st.integers(0, 3), st.integers(0, 6))
def test_padding_is_no_token(padding, more):
    tokens = torch.randint(4, 9, (3, 10), generator=generator())
    padded = torch.cat([tokens, torch.full((3, more), padding)], dim=1)
    features = by_medium(medium_of(seen(tokens, padding=padding), 10**5))
    assert features.padding == padding
    found = [features.of({}, seen(x), nowhere()) for x in (tokens, padded)]
    assert torch.equal(*found)
    assert by_medium(medium_of(seen(tokens), 10**5)).padding is None


def seen(x, outputs=10, **parts):
    """What a network shows of a batch, as far as features look."""
    first = x[0] if isinstance(x, tuple) else x
    return Readout(None, {}, torch.zeros(len(first), outputs), {}, x=x, **parts)


def nowhere(*hidden):
    return Sites(None, hidden, {}, torch.arange(2))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def images(count=6, channels=3, side=12, seed=0):
    return torch.rand(count, channels, side, side, generator=generator(seed))


@pytest.mark.parametrize(("channels", "size", "grid"), [(3, 4, (2, 2)), (1, 3, (3, 3)), (3, 6, (2, 1))])
def test_a_bank_matches_each_patch_with_its_filters(channels, size, grid):
    given = grid if grid[0] != grid[1] else grid[0]
    bank = PatchBank(5, size=size, grid=given, threshold=0.2, mirrored=False)
    x = images(4, channels)
    fixed = bank.begin(seen(images(50, channels, seed=1)), nowhere(), generator())
    found = bank.of(fixed, seen(x), nowhere()).reshape(4, 2, 5, *grid)
    places = x.shape[-1] - size + 1
    matches = torch.zeros(4, 5, places, places)
    for row in range(places):
        for column in range(places):
            patch = x[:, :, row : row + size, column : column + size].flatten(1)
            patch = patch - patch.mean(dim=1, keepdim=True)
            patch = patch / (patch.var(dim=1, keepdim=True) + NOISE).sqrt()
            matches[:, :, row, column] = patch @ fixed["weight"].flatten(1).T + fixed["bias"]
    for half, sign in ((0, 1), (1, -1)):
        expected = F.adaptive_avg_pool2d((sign * matches - 0.2).clamp_min(0), grid)
        torch.testing.assert_close(found[:, half], expected, rtol=1e-3, atol=1e-4)


def test_a_mirrored_bank_takes_an_image_and_its_mirror_image_for_one():
    bank = PatchBank(5, size=4)
    fixed = bank.begin(seen(images(50)), nowhere(), generator())
    x = images()
    torch.testing.assert_close(bank.of(fixed, seen(x), nowhere()), bank.of(fixed, seen(x.flip(3)), nowhere()))


def test_a_bank_raises_its_averages_to_a_power():
    plain, raised, x = PatchBank(5), PatchBank(5, power=0.5), images(4)
    fixed = plain.begin(seen(images(50, seed=1)), nowhere(), generator())
    expected = plain.of(fixed, seen(x), nowhere()).sqrt()
    assert float(expected.max()) > 0.1
    torch.testing.assert_close(raised.of(fixed, seen(x), nowhere()), expected)


def test_images_without_contrast_make_a_bank_that_gives_numbers():
    bank = PatchBank(5)
    fixed = bank.begin(seen(torch.zeros(9, 1, 8, 8)), nowhere(), generator())
    assert bool(bank.of(fixed, seen(torch.zeros(2, 1, 8, 8)), nowhere()).isfinite().all())


def test_of_a_random_layer_only_the_seed_is_kept():
    x = torch.randn(40, 7)
    layer, again, other = RandomFeatures(16), RandomFeatures(16), RandomFeatures(16, seed=1)
    fixed = layer.begin(seen(x), nowhere(), generator())
    assert {name: value.numel() for name, value in fixed.items()} == {"centre": 7, "scale": 1}
    found = layer.of(fixed, seen(x), nowhere())
    assert torch.equal(found, again.of(again.begin(seen(x), nowhere(), generator(5)), seen(x), nowhere()))
    assert not torch.equal(found, other.of(fixed, seen(x), nowhere()))
    assert found.shape == (40, 16)
    assert 0.2 < float((found > 0).float().mean()) < 0.8


@given(st.data())
def test_runs_of_tokens_are_counted(data):
    length = data.draw(st.integers(1, 9))
    rows = data.draw(st.lists(st.lists(st.integers(0, 5), min_size=length, max_size=length), min_size=1, max_size=4))
    padding = data.draw(st.sampled_from([None, 0]))
    bins = 100_003  # so many that no two runs share one
    grams = HashedNgrams((bins, bins), padding=padding)
    found = grams.of({}, seen(torch.tensor(rows)), nowhere())
    for row, values in zip(rows, found, strict=True):
        runs = [[tuple(row[i : i + n]) for i in range(length - n + 1)] for n in (1, 2)]
        kept = [Counter(run for run in each if padding not in run) for each in runs]
        counts = torch.tensor([count for each in kept for count in each.values()]).float().log1p()
        expected = counts / counts.norm().clamp_min(1e-6) if len(counts) else counts
        torch.testing.assert_close(values[values > 0].sort().values, expected.sort().values)


def test_the_same_run_has_the_same_place_in_every_text():
    grams = HashedNgrams((8, 64))
    a, b = grams.of({}, seen(torch.tensor([[3, 4, 9, 9], [7, 7, 3, 4]])), nowhere())
    assert bool((a[8:] > 0)[b[8:] > 0].any())


def unit_site(units, own):
    return Site("w", torch.arange(units), torch.tensor(own), None, torch.arange(0))


@pytest.mark.parametrize("shape", [(2, 4), (2, 5, 4), (2, 6, 5, 4), (2, 1, 3, 2, 4)])
def test_units_of_the_first_task_are_averaged_in_cells(shape):
    x, own = torch.rand(shape, generator=generator()), [True, False, True, True]
    found = FirstUnits(2).of({}, seen(torch.zeros(2, 1), maps={"w": x}), nowhere(unit_site(4, own)))
    values = x[..., own].movedim(-1, 1)
    for axis in range(2, values.ndim):
        parts = values.tensor_split(2, dim=axis) if values.shape[axis] > 1 else [values, values]
        values = torch.stack([part.mean(dim=axis) for part in parts], dim=axis)
    torch.testing.assert_close(found, values.flatten(1))


def test_units_are_raised_to_a_power_by_their_size():
    x, site = torch.tensor([[4.0, -9.0, 7.0], [0.0, 1.0, 7.0]]), unit_site(3, [True, True, False])
    found = FirstUnits(power=0.5).of({}, seen(torch.zeros(2, 1), maps={"w": x}), nowhere(site))
    torch.testing.assert_close(found, torch.tensor([[2.0, -3.0], [0.0, 1.0]]))
    with pytest.raises(ContinualError, match="Pretrained: power must be a finite number above 0, got -1"):
        Pretrained(power=-1)


def test_a_first_task_without_units_is_said():
    with pytest.raises(ContinualError, match="the first task owns no hidden unit"):
        FirstUnits().of({}, seen(torch.zeros(2, 1), maps={"w": torch.zeros(2, 4)}), nowhere(unit_site(4, [False] * 4)))


def test_of_a_pretrained_part_the_layers_count_that_are_owned_whole():
    maps = {"whole": torch.rand(2, 3, 3, 4), "part": torch.rand(2, 4), "mixed": torch.rand(2, 5)}
    sites = [unit_site(4, [True] * 4), unit_site(4, [True, False, True, True]), unit_site(4, [True] * 4)]
    sites = [replace(site, weight=name) for site, name in zip(sites, maps, strict=True)]  # "mixed": a fifth is free
    found = Pretrained().of({}, seen(torch.zeros(2, 1), maps=maps), nowhere(*sites))
    torch.testing.assert_close(found, maps["whole"].mean(dim=(1, 2)))
    with pytest.raises(ContinualError, match=r"the first task owns no layer whole .*exclude"):
        Pretrained().of({}, seen(torch.zeros(2, 1), maps=maps), nowhere(*sites[1:]))


def test_features_stand_side_by_side():
    both = Values() + Custom(lambda x: x.sum(dim=1, keepdim=True)) + RandomFeatures(3)
    x = torch.randn(5, 4)
    fixed = both.begin(seen(x), nowhere(), generator())
    found = both.of(fixed, seen(x), nowhere())
    assert found.shape == (5, 8)
    assert torch.equal(found[:, :4], x)
    assert torch.equal(found[:, 4], x.sum(dim=1))
    assert set(fixed) == {"2.centre", "2.scale"}


def test_several_inputs_are_seen_side_by_side():
    x = torch.randn(5, 4), torch.arange(5)
    assert torch.equal(Values().of({}, seen(x), nowhere())[:, 4], torch.arange(5).float())


@pytest.mark.parametrize(
    ("features", "x", "said"),
    [
        (PatchBank(), torch.zeros(2, 5), r"patches are cut out of images, .*; the network's input is \[2, 5\]"),
        (HashedNgrams(), torch.zeros(2, 5), "runs of tokens are counted in whole numbers"),
        (Custom(lambda x: 3), torch.zeros(2, 5), "must give a tensor of one row a sample, 2 here; it gave int"),
        (Custom(lambda x: x[:1]), torch.zeros(2, 5), r"2 here; it gave \[1, 5\]"),
    ],
)
def test_what_cannot_be_seen_so_is_refused(features, x, said):
    with pytest.raises(ContinualError, match=said):
        features.of({}, seen(x), nowhere())


@pytest.mark.parametrize(
    ("x", "kind"),
    [
        (torch.zeros(2, 3, 32, 32), PatchBank),
        (torch.zeros(2, 1, 8, 8), PatchBank),
        (torch.zeros(2, 1, 4, 4), RandomFeatures),
        (torch.zeros(2, 12), RandomFeatures),
        (torch.zeros(2, 3, 50), RandomFeatures),
        (torch.zeros(2, 20, dtype=torch.long), HashedNgrams),
        ((torch.zeros(2, 3), torch.zeros(2, 4)), RandomFeatures),
    ],
)
def test_the_kind_of_input_chooses(x, kind):
    assert isinstance(by_medium(medium_of(seen(x), 150_000)), kind)


def test_many_features_of_grey_images_are_a_random_layer_behind_patches():
    features = by_medium(medium_of(seen(torch.zeros(2, 1, 28, 28)), 2_500_000))
    assert isinstance(features, RandomFeatures)
    assert isinstance(features.behind, PatchBank)


@pytest.mark.parametrize("budget", [20_000, 150_000, 900_000])
@pytest.mark.parametrize(
    "x",
    [
        images(40, 3, 32),
        images(40, 1, 28),
        images(40, 1, 8),
        torch.rand(40, 600, generator=generator()),
        torch.rand(40, 12, generator=generator()),
        torch.randint(50, (40, 30), generator=generator()),
        None,
    ],
    ids=["colour", "grey", "small", "many values", "few values", "tokens", "units"],
)
def test_all_that_is_kept_stays_within_the_budget(budget, x):
    strategy, maps = Accumulated("lda"), {"w": torch.rand(40, 3, 3, 8, generator=generator())}
    looks = nowhere(unit_site(8, [True] * 8))
    shown = Readout(None, {}, torch.zeros(40, 10), {}, x=x, maps=maps)
    kept = strategy.begin(shown, looks, generator(), budget)
    kept = strategy.close(strategy.add(kept, shown, looks, torch.arange(40) % 10))
    calibration = 3 * 10
    count = calibration + sum(value.numel() for value in kept.values())
    assert budget / 2 < count <= budget


@pytest.mark.parametrize(("positions", "cells"), [(4, 4), (9, 4), (6, 2), (1, 1)])
def test_units_whose_positions_are_laid_out_in_a_row_are_averaged_in_cells_too(positions, cells):
    maps = torch.rand(3, 2 * positions, generator=generator())
    site = replace(
        unit_site(2 * positions, [True] * 2 * positions), units=torch.tensor([4, 7]).repeat_interleave(positions)
    )
    found = FirstUnits(2).of({}, seen(torch.zeros(3, 1), maps={"w": maps}), nowhere(site))
    assert found.shape == (3, 2 * cells)
    if positions in (4, 9):  # as if they lay between samples and units
        side = int(positions**0.5)
        spread = maps.reshape(3, 2, side, side).permute(0, 2, 3, 1)
        plain = FirstUnits(2).of({}, seen(torch.zeros(3, 1), maps={"w": spread}), nowhere(unit_site(2, [True, True])))
        torch.testing.assert_close(found, plain)
    before = FirstUnits(2).of({}, seen(torch.zeros(3, 1), maps={"w": maps}), nowhere(Site.from_state(site.state()[:5])))
    assert torch.equal(before, maps)  # as older versions kept it
