from dataclasses import replace
from io import BytesIO
from itertools import chain
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex
from matplotlib.quiver import Quiver
from references import similarity as slow_similarity

from lightning_cf.errors import ContinualError
from lightning_cf.partition.clusters import Partition
from lightning_cf.partition.similarity import Similarity
from lightning_cf.records.record import LayerRecord, PartitionRecord, StoredSimilarity, complete_record
from lightning_cf.reporting.unit_pictures import similarity_picture, units_picture

CLAIMED, REDUNDANT, EARLIER = "#1b6ca8", "#f0b27a", "#b5b5b5"


def layer_of(vectors, representative, *, owned=0, name="fc", biases=None):
    """A layer whose first units belong to an earlier task; ``representative`` is about the others."""
    candidates, found = torch.arange(owned, len(vectors)), torch.tensor(representative)
    owner = torch.full((len(vectors),), -1)
    owner[:owned] = 0
    owner[candidates[found.unique()]] = 1
    biases = torch.zeros(len(vectors)) if biases is None else biases
    return LayerRecord.of(name, (name,), candidates, Partition(found, 0.25), vectors, biases, owner)


def random_layer(units, claimed, *, owned=0, inputs=5, seed=0, name="fc"):
    generator = torch.Generator().manual_seed(seed)
    leaders = torch.randperm(units - owned, generator=generator)[:claimed]
    found = leaders[torch.randint(claimed, (units - owned,), generator=generator)]
    found[leaders] = leaders
    vectors = torch.randn(units, inputs, generator=generator) + 0.5
    biases = 0.1 * torch.randn(units, generator=generator)
    return layer_of(vectors, found.tolist(), owned=owned, biases=biases, name=name)


def completed(layer, seed=1):
    noise = torch.randn(layer.direction.shape, generator=torch.Generator().manual_seed(seed))
    vectors = vectors_of(layer) + noise
    norms = vectors.norm(dim=1)
    return replace(layer, magnitude_after=norms, direction_after=vectors / norms[:, None], bias_after=layer.bias)


def vectors_of(layer):
    return layer.magnitude[:, None] * layer.direction


def record_of(*layers, task="digits", **constraints):
    return PartitionRecord(task, 1, "exact", constraints, 0.9, 0.9, layers)


def stored(tmp_path, layer, similarity, **constraints):
    record_of(layer, **constraints).write(tmp_path, {layer.name: similarity})
    return PartitionRecord.load(tmp_path)


def drawn(figure):
    """The whole picture comes out, without a warning."""
    figure.savefig(BytesIO(), dpi=50)
    return figure


def arrows(axis):
    """Tips of the arrows by colour."""
    quivers = [child for child in axis.get_children() if isinstance(child, Quiver)]
    return {to_hex(each.get_facecolor()[0]): np.stack([each.U, each.V], axis=1) for each in quivers if each.N}


def planes(layer):
    """The tips of all units before and after, by numpy; the sign of each axis is open."""
    vectors = vectors_of(layer).double().numpy()
    leading = np.linalg.svd(vectors[layer.candidates.numpy()])[2][:2]
    after = layer.magnitude_after[:, None] * layer.direction_after
    return vectors @ leading.T, after.double().numpy() @ leading.T


# Units as vectors


@settings(max_examples=15)
@given(st.integers(0, 99), st.integers(0, 4), st.integers(1, 6), st.integers(2, 6))
def test_arrows_are_the_units_in_the_plane_of_the_leading_singular_vectors(seed, owned, claimed, inputs):
    layer = completed(random_layer(14, claimed, owned=owned, inputs=inputs, seed=seed))
    before, after = (arrows(axis) for axis in units_picture(record_of(layer)).axes)
    expected_before, expected_after = planes(layer)
    signs = np.where(expected_before[layer.candidates.numpy()].sum(axis=0) < 0, -1, 1)
    units = {CLAIMED: layer.non_redundant, REDUNDANT: layer.redundant, EARLIER: torch.arange(owned)}
    for found, expected in ((before, expected_before), (after, expected_after)):
        assert found.keys() == {color for color, numbers in units.items() if len(numbers)}
        for color, tips in found.items():
            np.testing.assert_allclose(tips, signs * expected[units[color].numpy()], atol=1e-4)


def test_the_plane_of_a_large_layer_is_that_of_an_even_sample():
    layer = random_layer(21, 4, owned=2)
    with patch("lightning_cf.reporting.unit_pictures.SAMPLE", 7):
        (axis,) = units_picture(record_of(layer)).axes
    vectors = vectors_of(layer).double().numpy()
    sample = vectors[[2, 5, 8, 11, 14, 17, 20]]
    leading = np.linalg.svd(sample)[2][:2]
    leading *= np.where((sample @ leading.T).sum(axis=0) < 0, -1, 1)[:, None]
    np.testing.assert_allclose(arrows(axis)[CLAIMED], vectors[layer.non_redundant.numpy()] @ leading.T, atol=1e-5)


def test_claimed_units_lie_on_top_and_arrows_start_at_the_origin():
    (axis,) = units_picture(record_of(random_layer(20, 4, owned=3))).axes
    quivers = [child for child in axis.get_children() if isinstance(child, Quiver)]
    order = [to_hex(each.get_facecolor()[0]) for each in sorted(quivers, key=lambda each: each.get_zorder())]
    assert order == [EARLIER, REDUNDANT, CLAIMED]
    for each in quivers:
        assert not each.XY.any()
        assert (each.angles, each.scale_units, each.scale) == ("xy", "xy", 1)


def test_units_that_an_earlier_partition_of_the_task_gave_up_are_redundant():
    layer = random_layer(10, 2, owned=4)
    layer = replace(layer, owner=layer.owner.where(layer.owner != 0, -1))
    (axis,) = units_picture(record_of(layer)).axes
    assert {color: len(tips) for color, tips in arrows(axis).items()} == {CLAIMED: 2, REDUNDANT: 8}
    assert "2 claimed, 8 redundant" in axis.get_title()


def test_both_panels_of_a_layer_have_the_same_square_window_around_all_arrows():
    before, after = units_picture(record_of(completed(random_layer(20, 4, owned=3)))).axes
    assert (before.get_xlim(), before.get_ylim()) == (after.get_xlim(), after.get_ylim())
    assert np.ptp(before.get_xlim()) == pytest.approx(np.ptp(before.get_ylim()))
    assert before.get_aspect() == 1
    tips = np.concatenate([tips for axis in (before, after) for tips in [*arrows(axis).values(), np.zeros((1, 2))]])
    for values, (low, high) in zip(tips.T, (before.get_xlim(), before.get_ylim()), strict=True):
        assert low < values.min()
        assert values.max() < high
    assert max(np.ptp(tips, axis=0)) > 0.9 * np.ptp(before.get_xlim())


def test_labels_say_how_much_the_plane_shows():
    layer = completed(random_layer(30, 4, owned=3))
    before, after = units_picture(record_of(layer)).axes
    candidates = layer.candidates.numpy()
    lengths = (layer.magnitude[candidates], layer.magnitude_after[candidates])
    for axis, tips, length in zip((before, after), planes(layer), lengths, strict=True):
        share = 100 * np.square(tips[candidates]).sum() / float(length.square().sum())
        assert 10 < share < 99
        assert f"plane shows {share:.0f} % of the squared length" in axis.get_xlabel()


@pytest.mark.parametrize(
    ("claimed", "expected"),
    [(4, {CLAIMED: 4, REDUNDANT: 5, EARLIER: 1}), (12, {CLAIMED: 10}), (10, {CLAIMED: 10}), (60, {CLAIMED: 10})],
)
def test_a_panel_draws_no_more_arrows_than_its_most(claimed, expected):
    layer = random_layer(72, claimed, owned=12)
    with patch("lightning_cf.reporting.unit_pictures.MOST_ARROWS", 10):
        (axis,) = units_picture(record_of(layer)).axes
    found = arrows(axis)
    assert {color: len(tips) for color, tips in found.items()} == expected
    assert f"{claimed} claimed, {60 - claimed} redundant; 10 of 72 units drawn" in axis.get_title()
    every = arrows(units_picture(record_of(layer)).axes[0])
    assert sum(len(tips) for tips in every.values()) == 72
    for color, tips in found.items():
        places = [int(np.abs(every[color] - tip).sum(axis=1).argmin()) for tip in tips]
        assert places == sorted(set(places))
        if color == CLAIMED and claimed > 10:
            assert (places[0], places[-1]) == (0, claimed - 1)
            assert np.diff(places).max() - np.diff(places).min() <= 1


def test_layers_have_a_row_each_and_a_second_panel_once_invariance_is_over():
    first, second = random_layer(9, 3, name="a.1"), random_layer(9, 3, name="b.2", seed=1)
    titles = [axis.get_title().split("\n")[0] for axis in units_picture(record_of(first, second)).axes]
    assert titles == ["a.1, before INVARIANCE", "b.2, before INVARIANCE"]
    titles = [axis.get_title().split("\n")[0] for axis in units_picture(record_of(first, completed(second))).axes]
    assert titles == ["a.1, before INVARIANCE", "b.2, before INVARIANCE", "b.2, after INVARIANCE"]
    (legend,) = units_picture(record_of(first)).legends
    assert [text.get_text() for text in legend.get_texts()] == ["claimed", "redundant", "of earlier tasks"]


@pytest.mark.parametrize(("units", "inputs", "scale"), [(1, 3, 1.0), (1, 1, 1.0), (6, 1, 1.0), (4, 3, 0.0)])
def test_layers_of_few_dimensions_are_drawn(units, inputs, scale):
    layer = layer_of(scale * torch.randn(units, inputs, generator=torch.Generator().manual_seed(0)), [0] * units)
    (axis,) = drawn(units_picture(record_of(layer))).axes
    assert "plane shows 100 %" in axis.get_xlabel()
    lengths = np.linalg.norm(np.concatenate(list(arrows(axis).values())), axis=1)
    np.testing.assert_allclose(np.sort(lengths), np.sort(layer.magnitude), rtol=1e-6)
    assert axis.get_xlim()[0] < 0 < axis.get_xlim()[1]
    drawn(similarity_picture(record_of(layer)))


def test_units_that_diverged_in_invariance_leave_the_others_to_see():
    layer = completed(random_layer(8, 2))
    layer.magnitude_after[3] = float("nan")
    before, after = drawn(units_picture(record_of(layer))).axes
    assert np.isfinite([*before.get_xlim(), *after.get_xlim()]).all()


@pytest.mark.parametrize("name", [r"$\no_formula$", "$", "a" * 300])
def test_names_are_shown_as_they_are(name):
    layer = completed(random_layer(8, 2, name=name))
    for figure in (units_picture(record_of(layer, task=name)), similarity_picture(record_of(layer, task=name))):
        assert name[:18] in drawn(figure).axes[0].get_title()


# Similarity


def shown(axis):
    return np.asarray(axis.get_images()[0].get_array())


def by_cluster(layer):
    """Places of the candidates, cluster by cluster, in plain Python."""
    candidates, leader = layer.candidates.tolist(), layer.representative.tolist()
    members = {unit: [other for other in candidates if leader[other] == unit] for unit in layer.non_redundant.tolist()}
    falling = sorted(members, key=lambda unit: (-len(members[unit]), -float(layer.magnitude[unit]), unit))
    order = [[unit] + [other for other in members[unit] if other != unit] for unit in falling]
    return [[candidates.index(unit) for unit in cluster] for cluster in order]


@settings(max_examples=15)
@given(st.integers(0, 99), st.integers(0, 4), st.integers(1, 6))
def test_the_matrix_is_ordered_by_cluster(seed, owned, claimed):
    layer = random_layer(20, claimed, owned=owned, seed=seed)
    figure = similarity_picture(record_of(layer))
    clusters = by_cluster(layer)
    order = list(chain(*clusters))
    candidates = layer.candidates
    expected = np.array(slow_similarity(vectors_of(layer)[candidates], layer.bias[candidates]))
    np.testing.assert_allclose(shown(figure.axes[0]), expected[order][:, order], atol=1e-6)
    across, down = [child for child in figure.axes[0].get_children() if isinstance(child, LineCollection)]
    bounds = np.cumsum([len(cluster) for cluster in clusters])[:-1] - 0.5
    assert [segment[0][1] for segment in across.get_segments()] == bounds.tolist()
    assert [segment[0][0] for segment in down.get_segments()] == bounds.tolist()


def test_a_stored_matrix_is_shown_and_one_that_is_not_is_computed_and_says_so(tmp_path):
    layer = random_layer(12, 3, owned=2)
    other = Similarity(torch.randn(10, 4, generator=torch.Generator().manual_seed(5)), torch.zeros(10))
    record = stored(tmp_path, layer, other, measure="update")
    order = torch.tensor(list(chain(*by_cluster(layer))))
    axis, bar = drawn(similarity_picture(record)).axes
    np.testing.assert_allclose(shown(axis), other.tile(order, order).numpy(), atol=1e-6)
    assert bar.get_ylabel() == "similarity (update measure)"
    assert [line.get_ydata()[0] for line in bar.get_lines()] == [0.25]
    axis, bar = similarity_picture(record_of(layer, measure="update")).axes
    assert bar.get_ylabel() == "similarity (weight measure, computed from the record)"
    assert list(bar.get_lines()) == []  # a threshold of another measure would mislead


def test_similarities_below_minus_one_leave_the_scale_of_the_others():
    layer = random_layer(12, 3)
    layer = replace(layer, bias=100 * layer.bias, threshold=-50.0)
    axis, bar = drawn(similarity_picture(record_of(layer))).axes
    assert list(bar.get_lines()) == []
    assert bar.get_ylim() == (-1, 1)
    assert shown(axis).min() < -1
    assert axis.get_images()[0].get_clim() == (-1, 1)
    assert axis.get_images()[0].colorbar.extend == "min"


def test_a_measure_of_its_own_has_a_scale_of_its_own(tmp_path):
    layer = random_layer(12, 3)
    distance = Similarity(vectors_of(layer), layer.bias.double(), measure=lambda v, b, w, c: -torch.cdist(v, w))
    axis, bar = drawn(similarity_picture(stored(tmp_path, layer, distance, measure="mine.distance"))).axes
    assert axis.get_images()[0].get_clim() == (shown(axis).min(), shown(axis).max())
    assert bar.get_ylabel() == "similarity (mine.distance measure)"


class Numbers(StoredSimilarity):
    """Tells which units were asked for."""

    def tile(self, rows, columns):
        return 100.0 * rows[:, None] + columns


@pytest.mark.parametrize(("claimed", "most"), [(3, 30), (1, 7), (50, 8), (60, 59)])
def test_of_many_units_an_even_sample_of_each_cluster_is_shown(claimed, most):
    layer = replace(random_layer(63, claimed, owned=3), similarity=Numbers(Path(), 60, 60))
    clusters = by_cluster(layer)
    with patch("lightning_cf.reporting.unit_pictures.MOST_UNITS", most):
        axis = similarity_picture(record_of(layer)).axes[0]
    places = (shown(axis)[0] % 100).astype(int).tolist()
    assert (shown(axis)[:, 0] // 100).astype(int).tolist() == places
    assert len(set(places)) == len(places) == most
    assert f"{most} of 60 units shown" in axis.get_title()
    cluster_of = {place: number for number, cluster in enumerate(clusters) for place in cluster}
    numbers = [cluster_of[place] for place in places]
    assert numbers == sorted(numbers)
    for number, cluster in enumerate(clusters):
        sample = [place for place in places if cluster_of[place] == number]
        assert abs(len(sample) - most / 60 * len(cluster)) < 1 + 1e-9
        assert sample[:1] in ([], cluster[:1])
        assert [cluster.index(place) for place in sample] == sorted(cluster.index(place) for place in sample)


def test_bounds_of_many_clusters_are_left_out():
    layer = random_layer(60, 45)
    assert not [x for x in similarity_picture(record_of(layer)).axes[0].get_children() if isinstance(x, LineCollection)]


def test_one_layer_or_all_of_them():
    record = record_of(*(random_layer(9, 3, name=name) for name in "abcd"))
    figure = drawn(similarity_picture(record))
    assert [axis.get_title()[0] for axis in figure.axes if axis.get_images()] == list("abcd")
    (axis, _) = similarity_picture(record, "c").axes
    assert axis.get_title() == "c: 3 clusters at threshold 0.25\n9 of 9 units shown"
    with pytest.raises(ContinualError, match="'digits' has no layer 'e'; it has a, b, c, d"):
        similarity_picture(record, "e")


def test_a_record_read_from_disk_is_drawn(tmp_path):
    layer = random_layer(9, 3)
    stored(tmp_path, layer, Similarity(vectors_of(layer), layer.bias.double()))
    complete_record(tmp_path, {"fc": (vectors_of(layer) * 2, layer.bias)})
    record = PartitionRecord.load(tmp_path)
    before, after = (arrows(axis) for axis in drawn(units_picture(record)).axes)
    np.testing.assert_allclose(after[CLAIMED], 2 * before[CLAIMED], rtol=1e-5)
    drawn(similarity_picture(record))
