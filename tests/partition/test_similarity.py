import math
from itertools import pairwise
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import similarity, thresholds, unit_groups

from lightning_cf.errors import ContinualError
from lightning_cf.partition.clusters import CLUSTERS, partition, partition_into
from lightning_cf.partition.similarity import Similarity

bias_weights = st.sampled_from([0.0, 0.5, 1.0])


def whole(s):
    return s.tile(slice(None), slice(None))


@given(unit_groups(), bias_weights)
def test_values_equal_the_reference(group, bias_weight):
    expected = torch.tensor(similarity(*group, bias_weight), dtype=torch.float64)
    torch.testing.assert_close(whole(Similarity(*group, bias_weight)), expected, rtol=1e-14, atol=1e-14)


@given(st.integers(0, 99), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_values_equal_the_reference_for_random_weights(seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    vectors, biases = torch.randn(7, 5, generator=generator).to(dtype), torch.randn(7, generator=generator).to(dtype)
    expected = torch.tensor(similarity(vectors, biases), dtype=torch.float64)
    torch.testing.assert_close(whole(Similarity(vectors, biases)), expected, rtol=0, atol=1e-14)


@given(unit_groups(), st.data())
def test_a_tile_is_a_part_of_the_whole(group, data):
    s = Similarity(*group)
    units = st.lists(st.integers(0, len(s) - 1), min_size=1)
    rows, columns = torch.tensor(data.draw(units)), torch.tensor(data.draw(units))
    assert torch.equal(s.tile(rows, columns), whole(s)[rows][:, columns])
    assert torch.equal(s.tile(slice(0, 2), columns), whole(s)[:2][:, columns])


@given(unit_groups(), bias_weights)
def test_symmetric_and_one_with_itself(group, bias_weight):
    tile = whole(Similarity(*group, bias_weight))
    assert torch.equal(tile, tile.T)
    torch.testing.assert_close(tile.diagonal(), torch.ones(len(tile)).double(), rtol=0, atol=1e-15)


@given(unit_groups(), st.integers(1, 16))
def test_tiles_hold_each_pair_once(group, size):
    s = Similarity(*group)
    seen = torch.full((len(s), len(s)), torch.nan).double()
    for rows, columns, values in s.tiles(size):
        assert max(values.shape) <= size and rows[0] <= columns[0]
        assert seen[rows[:, None], columns].isnan().all()
        seen[rows[:, None], columns] = values
    upper = torch.ones(len(s), len(s)).triu().bool()
    assert torch.equal(seen[upper], whole(s)[upper])


def test_zero_vectors_are_alike_and_unlike_all_others():
    s = Similarity(torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]]), torch.zeros(3))
    assert whole(s).tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["vectors", "biases"])
def test_weights_that_are_not_finite_are_refused(value, where):
    tensors = {"vectors": torch.ones(3, 2), "biases": torch.zeros(3)}
    tensors[where][-1] = value
    with pytest.raises(ContinualError, match="not all finite; the training diverged"):
        Similarity(**tensors)


@given(unit_groups())
def test_quantiles_are_similarities_of_distinct_pairs(group):
    s, points = Similarity(*group), (0.0, 0.3, 0.5, 0.9, 1.0)
    expected = similarity(*group)
    pairs = sorted(expected[i][j] for i in range(len(s)) for j in range(i))
    quantiles = s.quantiles(points)
    if pairs:
        assert quantiles == pytest.approx([pairs[round(p * (len(pairs) - 1))] for p in points], rel=1e-14, abs=1e-14)
    else:
        assert all(math.isnan(q) for q in quantiles)


def test_quantiles_of_many_units_come_from_an_even_sample():
    angles = torch.linspace(0, math.pi / 2, 101)
    s = Similarity(torch.stack([angles.cos(), angles.sin()], dim=1), torch.zeros(101))
    assert s.quantiles((0.0, 1.0), sample=3) == pytest.approx([0, math.cos(math.pi / 4)], abs=1e-6)


def negative_distance(a, biases_a, b, biases_b):
    return -torch.cdist(a, b) - (biases_a[:, None] - biases_b[None, :]).abs()


@given(unit_groups(), st.data())
def test_a_measure_is_called_with_the_units_of_a_tile_in_double_precision(group, data):
    units = st.lists(st.integers(0, len(group[0]) - 1), min_size=1)
    rows, columns = torch.tensor(data.draw(units)), torch.tensor(data.draw(units))
    calls = []

    def products(*units):
        calls.append(units)
        return units[0] @ units[2].T + units[1][:, None] * units[3]

    s = Similarity(*group, measure=products)
    values = s.tile(rows, columns)
    vectors, biases = group[0].double(), group[1].double()
    expected = (vectors[rows], biases[rows], vectors[columns], biases[columns])
    assert all(torch.equal(*pair) and pair[0].dtype == torch.float64 for pair in zip(calls[0], expected, strict=True))
    assert torch.equal(values, products(*expected))


def test_a_measure_leaves_the_magnitudes_as_they_are():
    vectors = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    assert Similarity(vectors, torch.zeros(2), measure=negative_distance).norms.tolist() == [5, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bfloat16])
def test_a_measure_may_return_any_real_type_and_carry_gradients(dtype):
    factor = torch.ones((), dtype=dtype, requires_grad=dtype.is_floating_point)
    s = Similarity(torch.eye(2), torch.zeros(2), measure=lambda a, _, b, __: (a @ b.T).to(dtype) * factor)
    assert whole(s).dtype == torch.float64
    assert whole(s).tolist() == [[1, 0], [0, 1]]
    assert not whole(s).requires_grad


def a_list(a, biases_a, b, biases_b):
    return (a @ b.T).tolist()


def too_few(a, biases_a, b, biases_b):
    return (a @ b.T).sum(dim=1)


def all_units(a, biases_a, b, biases_b):
    return torch.zeros(3, 3)


def imaginary(a, biases_a, b, biases_b):
    return (a @ b.T).to(torch.complex128)


def not_a_number(a, biases_a, b, biases_b):
    return (a @ b.T) * torch.nan


def boundless(a, biases_a, b, biases_b):
    return (a @ b.T).exp() - torch.inf


class TooFew:
    def __call__(self, *units):
        return too_few(*units)

    def __repr__(self):
        return "TooFew()"


@pytest.mark.parametrize(
    ("measure", "returned"),
    [
        (a_list, "a_list returned an object of type list"),
        (too_few, r"too_few returned a tensor of shape \(3,\)"),
        (TooFew(), r"TooFew\(\) returned a tensor of shape \(3,\)"),
        (all_units, r"all_units returned a tensor of shape \(3, 3\)"),
        (imaginary, r"imaginary returned a tensor of shape \(3, 2\) and type torch.complex128"),
        (not_a_number, "not_a_number returned nan for a pair"),
        (boundless, "boundless returned -inf for a pair"),
    ],
)
def test_a_measure_that_gives_no_similarities_is_refused(measure, returned):
    s = Similarity(torch.eye(3), torch.zeros(3), measure=measure)
    with pytest.raises(ContinualError, match=f"measure {returned}.*; it must return a Tensor of shape \\(3, 2\\)"):
        s.tile(slice(0, 3), torch.tensor([0, 1]))


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_a_measure_that_depends_on_the_order_of_a_pair_is_refused(size):
    def lead_of(a, biases_a, b, biases_b):
        return size * (a[:, :1] - b[:, 0])

    s = Similarity(torch.tensor([[1.0], [4.0]]), torch.zeros(2), measure=lead_of)
    with pytest.raises(ContinualError, match=r"lead_of returned -3.* for a pair and 3.* the other way round"):
        whole(s)


def test_a_measure_may_depend_on_the_order_of_a_pair_by_rounding():
    def rounded(a, biases_a, b, biases_b):
        return a @ b.T + 1e-12 * a[:, :1]

    vectors = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert whole(Similarity(vectors, torch.zeros(2), measure=rounded))[0, 1] == pytest.approx(11)


# What is partitioned by a measure


@given(unit_groups(), bias_weights, st.data(), st.sampled_from(CLUSTERS), st.sampled_from([None, 2]))
def test_the_formula_given_as_a_measure_changes_nothing(group, bias_weight, data, clusters, limit):
    threshold = data.draw(thresholds(*group, bias_weight))

    def formula(a, biases_a, b, biases_b):
        both = similarity(torch.cat([a, b]), torch.cat([biases_a, biases_b]), bias_weight)
        return torch.tensor(both, dtype=torch.float64)[: len(a), len(a) :]

    builtin = partition(Similarity(*group, bias_weight), threshold, limit=limit, clusters=clusters)
    with patch("lightning_cf.partition.clusters.TILE", data.draw(st.sampled_from([2, 1024]))):
        found = partition(Similarity(*group, measure=formula), threshold, limit=limit, clusters=clusters)
    assert torch.equal(found.representative, builtin.representative)


def on_a_line(points, measure):
    return Similarity(torch.tensor(points, dtype=torch.float64)[:, None], torch.zeros(len(points)), measure=measure)


def negative_square(a, biases_a, b, biases_b):
    return -(a - b.T).square()


@given(st.lists(st.integers(-40, 40), min_size=1, max_size=20), st.integers(0, 9))
def test_components_by_negative_distance_end_at_the_gaps(points, gap):
    s = on_a_line(points, lambda a, _, b, __: -(a - b.T).abs())
    ordered = sorted(points)
    ends = [a for a, b in pairwise(ordered) if b - a > gap]
    number = [sum(point > end for end in ends) for point in points]
    expected = [list(dict.fromkeys(number)).index(n) for n in number]
    assert partition(s, -float(gap), clusters="components").cluster.tolist() == expected
    assert partition_into(s, len(ends) + 1, clusters="components").cluster.tolist() == expected


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize(
    ("clusters", "count", "expected"),
    [
        ("leader", 1, [0, 0, 0, 0, 0]),
        ("leader", 2, [0, 1, 1, 1, 1]),
        ("leader", 3, [0, 1, 1, 1, 2]),
        ("leader", 5, [0, 1, 2, 3, 4]),
        ("components", 1, [0, 0, 0, 0, 0]),
        ("components", 2, [0, 0, 0, 0, 1]),
        ("components", 3, [0, 0, 1, 1, 2]),
        ("components", 4, [0, 0, 1, 2, 3]),
        ("components", 5, [0, 1, 2, 3, 4]),
    ],
)
def test_into_finds_the_threshold_of_a_measure_over_many_orders_of_magnitude(clusters, count, expected, scale):
    points = [0.0, 0.001, 1.0, 1.002, 1e9]
    s = on_a_line([scale * point for point in points], negative_square)
    assert partition_into(s, count, clusters=clusters).cluster.tolist() == expected


@settings(max_examples=20)
@given(st.lists(st.sampled_from([0.0, 1.0, 3.0, 1e-3, -2e-3, 1e3, 1e9]), min_size=1, max_size=7), st.data())
def test_into_finds_the_lowest_threshold_of_a_measure(points, data):
    s = on_a_line(points, negative_square)
    count = data.draw(st.integers(1, len(points)))
    found = partition_into(s, count)
    assert found.non_redundant.sum() == count
    lower = partition(s, math.nextafter(found.threshold, -math.inf))
    assert count == 1 or lower.non_redundant.sum() < count


@pytest.mark.parametrize("clusters", CLUSTERS)
def test_an_asymmetric_measure_is_refused(clusters):
    s = on_a_line([1.0, 2.0, 3.0], lambda a, _, b, __: a - b.T)
    with pytest.raises(ContinualError, match="the other way round"):
        partition(s, 0.5, clusters=clusters)
    with pytest.raises(ContinualError, match="the other way round"):
        partition_into(s, 2, clusters=clusters)
