from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import lead, magnitude, thresholds, unit_groups

from lightning_cf.partition import TILE, Partition, partition, partition_into
from lightning_cf.similarity import Similarity


@st.composite
def cases(draw):
    """A group, how much its biases count, and a threshold."""
    group = draw(unit_groups())
    bias_weight = draw(st.sampled_from([0.0, 1.0]))
    return group, bias_weight, draw(thresholds(*group, bias_weight))


def random_group(seed, units=30, inputs=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(units, inputs, generator=generator), 0.3 * torch.randn(units, generator=generator)


def in_tiles_of(size):
    return patch("lightning_cf.partition.TILE", size)


@given(cases())
def test_clusters_equal_the_reference(case):
    group, bias_weight, threshold = case
    found = partition(Similarity(*group, bias_weight), threshold)
    assert found.representative.tolist() == lead(*group, bias_weight, threshold)[0]
    assert found.threshold == threshold


@given(cases(), st.integers(1, 16))
def test_clusters_with_a_limit_equal_the_reference(case, limit):
    group, bias_weight, threshold = case
    found = partition(Similarity(*group, bias_weight), threshold, limit=limit)
    assert found.representative.tolist() == lead(*group, bias_weight, threshold, limit)[0]


@given(st.integers(0, 999), st.sampled_from([-0.5, 0.5, 0.9, 0.99]), st.sampled_from([None, 1, 4]))
def test_clusters_of_random_units_equal_the_reference(seed, threshold, limit):
    group = random_group(seed)
    found = partition(Similarity(*group), threshold, limit=limit)
    assert found.representative.tolist() == lead(*group, 1.0, threshold, limit)[0]


@given(cases(), st.sampled_from([1, 2, 3, 7]), st.sampled_from([None, 1, 2, 5]))
def test_tiles_change_nothing(case, tile, limit):
    group, bias_weight, threshold = case
    s = Similarity(*group, bias_weight)
    whole = partition(s, threshold, limit=limit)
    with in_tiles_of(tile):
        assert torch.equal(partition(s, threshold, limit=limit).representative, whole.representative)


@settings(max_examples=12)
@given(st.integers(0, 999), st.sampled_from([1, 2, 3, 7]), st.integers(1, 11))
def test_tiles_change_nothing_where_the_threshold_is_found(seed, tile, count):
    s = Similarity(*random_group(seed, units=11))
    whole = partition_into(s, count)
    with in_tiles_of(tile):
        tiled = partition_into(s, count)
    assert torch.equal(tiled.representative, whole.representative)
    assert tiled.threshold == whole.threshold


@given(cases(), st.sampled_from([None, 2]))
def test_a_representative_stands_for_itself_and_is_the_largest_of_its_cluster(case, limit):
    group, bias_weight, threshold = case
    found = partition(Similarity(*group, bias_weight), threshold, limit=limit)
    sizes = [magnitude(row) for row in group[0].double().tolist()]
    for unit, representative in enumerate(found.representative.tolist()):
        assert found.non_redundant[representative]
        assert found.representative[representative] == representative
        assert sizes[representative] >= sizes[unit]


def test_redundant_units_are_those_with_another_representative():
    found = Partition(torch.tensor([0, 0, 2, 2, 4]), 0.5)
    assert found.non_redundant.tolist() == [True, False, True, False, True]
    assert found.redundant.tolist() == [False, True, False, True, False]


def test_a_single_unit_leads():
    s = Similarity(torch.zeros(1, 3), torch.zeros(1))
    assert partition(s, 1.0).representative.tolist() == partition_into(s, 1).representative.tolist() == [0]


def test_units_of_equal_magnitude_lead_in_the_order_of_their_numbers():
    s = Similarity(torch.tensor([[3.0, 4.0], [5.0, 0.0], [4.0, 3.0], [5.0, 0.0]]), torch.zeros(4))
    assert partition(s, 0.95).representative.tolist() == [0, 1, 0, 1]


def test_a_unit_joins_the_first_similar_leader_not_the_nearest():
    s = Similarity(torch.tensor([[4.0, 0.0], [0.0, 3.0], [1.0, 1.1]]), torch.zeros(3))
    assert partition(s, 0.5).representative.tolist() == [0, 1, 0]
    assert partition(s, 0.9, limit=2).representative.tolist() == [0, 1, 1]


@pytest.mark.parametrize("threshold", [1.0, 0.5, 0.0, -1.0])
def test_a_similarity_at_the_threshold_is_enough(threshold):
    second = [threshold, (1 - threshold**2) ** 0.5]
    s = Similarity(torch.tensor([[1.0, 0.0], second], dtype=torch.float64), torch.zeros(2).double())
    assert partition(s, threshold).non_redundant.sum() == 1
    assert partition(s, threshold + 1e-6).non_redundant.sum() == 2


@pytest.mark.parametrize("scale", [1e-20, 1e-10, 1.0, 1e10, 1e20])
def test_directions_do_not_depend_on_lengths(scale):
    vectors, biases = random_group(3)
    scaled = Similarity(vectors * scale, biases)
    assert torch.equal(
        partition(scaled, 0.8).representative, partition(Similarity(vectors, biases), 0.8).representative
    )


@given(unit_groups(), st.data())
def test_into_gives_exactly_so_many_leaders(group, data):
    count = data.draw(st.integers(1, len(group[0])))
    found = partition_into(Similarity(*group), count)
    representative, leaders = lead(*group, 1.0, found.threshold, count)
    assert found.non_redundant.sum() == count
    assert found.representative.tolist() == representative
    assert found.non_redundant.nonzero().flatten().tolist() == sorted(leaders)


@given(unit_groups(), st.data())
def test_into_finds_the_lowest_threshold(group, data):
    vectors, biases = group[0], group[1].clamp(-1, 1)
    count = data.draw(st.integers(1, len(vectors)))
    threshold = partition_into(Similarity(vectors, biases), count).threshold
    assert count == 1 or len(lead(vectors, biases, 1.0, threshold - 1e-7)[1]) < count


def test_into_finds_the_threshold_beside_an_outlying_bias():
    vectors = torch.tensor([[9.0, 0.0], [8.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    biases = torch.tensor([0.0, 0.0, 0.0, 1e5])
    found = partition_into(Similarity(vectors, biases), 3)
    assert found.representative.tolist() == [0, 0, 2, 3]


@pytest.mark.parametrize("limit", [None, 1500])
def test_many_units_are_never_compared_all_at_once(limit):
    units, shapes, tile = 4500, [], Similarity.tile

    def recorded(self, rows, columns):
        result = tile(self, rows, columns)
        shapes.append(tuple(result.shape))
        return result

    s = Similarity(*random_group(0, units=units, inputs=8))
    with patch.object(Similarity, "tile", recorded):
        found = partition(s, 0.9, limit=limit)
    assert found.non_redundant.sum() > TILE
    assert max(rows * columns for rows, columns in shapes) <= TILE * TILE < units * units / 10
