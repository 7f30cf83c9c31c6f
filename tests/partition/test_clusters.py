from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import connect, lead, magnitude, thresholds, unit_groups

from lightning_cf.errors import ContinualError
from lightning_cf.partition.clusters import (
    CLUSTERS,
    TILE,
    Partition,
    _lead,
    _leader_counter,
    partition,
    partition_into,
)
from lightning_cf.partition.similarity import Similarity
from lightning_cf.partition.spanning_forest import Forest, spanning_forest


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
    """Small tiles, and not more similarities kept than one has."""
    return patch.multiple("lightning_cf.partition.clusters", TILE=size, KEPT=size)


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


def test_similarities_that_are_kept_change_nothing():
    s = Similarity(*random_group(0, units=1200, inputs=5))  # more than a tile
    kept = partition_into(s, 60)
    with in_tiles_of(1024):
        computed = partition_into(s, 60)
    assert torch.equal(kept.representative, computed.representative)
    assert kept.threshold == computed.threshold
    rows = torch.tensor([0, 1023, 1024, 1199])
    torch.testing.assert_close(s.kept().tile(rows, rows.flip(0)), s.tile(rows, rows.flip(0)))


@given(cases(), st.sampled_from([1, 2, 3, 7, 1024]), st.integers(1, 16), st.booleans())
def test_leaders_are_counted_as_they_lead(case, tile, most, measured):
    group, bias_weight, threshold = case
    measure = (lambda v, b, w, c: -torch.cdist(v, w) - (b[:, None] - c).abs()) if measured else None
    s = Similarity(*group, bias_weight, measure).kept()
    near = -torch.tensor([0.0, 0.5, 1.0, 2.0]) if measured else torch.tensor([threshold, 0.9, 0.0, -1.0])
    with patch("lightning_cf.partition.clusters.TILE", tile):
        count = _leader_counter(s, most)
        assert [count(float(t)) for t in near] == [len(_lead(s, float(t), most)[0]) for t in near]


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


# Clusters as connected components


@given(cases(), st.sampled_from([None, 1, 2, 5]), st.sampled_from([1, 2, 3, 7, 1024]))
def test_components_equal_the_reference_in_tiles_of_any_size(case, limit, tile):
    group, bias_weight, threshold = case
    with in_tiles_of(tile):
        found = partition(Similarity(*group, bias_weight), threshold, limit=limit, clusters="components")
    assert found.representative.tolist() == connect(*group, bias_weight, threshold, limit)[0]
    assert found.threshold == threshold


@given(st.integers(0, 999), st.sampled_from([0.5, 0.9, 0.97, 0.99]), st.sampled_from([None, 1, 4]))
def test_components_of_random_units_equal_the_reference(seed, threshold, limit):
    group = random_group(seed)
    found = partition(Similarity(*group), threshold, limit=limit, clusters="components")
    assert found.representative.tolist() == connect(*group, 1.0, threshold, limit)[0]


@given(unit_groups(), st.data(), st.sampled_from([1, 3, 1024]))
def test_into_gives_exactly_so_many_components(group, data, tile):
    count = data.draw(st.integers(1, len(group[0])))
    with in_tiles_of(tile):
        found = partition_into(Similarity(*group), count, clusters="components")
    representative, leaders = connect(*group, 1.0, found.threshold, count)
    assert found.non_redundant.nonzero().flatten().tolist() == sorted(leaders)
    assert len(leaders) == count
    assert found.representative.tolist() == representative


@settings(max_examples=25)
@given(st.integers(0, 999), st.sampled_from([5, 13]))
def test_tiles_leave_the_forest_as_it_is(seed, tile):
    s = Similarity(*random_group(seed))
    tiled, whole = spanning_forest(s, tile), spanning_forest(s, len(s))
    assert len(tiled.edges) == len(s) - 1
    torch.testing.assert_close(tiled.similarities, whole.similarities, rtol=0, atol=1e-12)


@settings(max_examples=25)
@given(st.integers(0, 999), st.integers(1, 30), st.sampled_from([5, 13]))
def test_into_gives_exactly_so_many_components_of_random_units(seed, count, tile):
    group = random_group(seed)
    with in_tiles_of(tile):
        found = partition_into(Similarity(*group), count, clusters="components")
    assert found.non_redundant.sum() == count
    # The threshold is just above a similarity, which rounding may lift across it in the reference.
    assert found.representative.tolist() == connect(*group, 1.0, found.threshold + 1e-12)[0]


@given(unit_groups(), st.data())
def test_into_finds_the_lowest_threshold_of_components(group, data):
    vectors, biases = group[0], group[1].clamp(-1, 1)
    count = data.draw(st.integers(2, max(2, len(vectors))))
    if count <= len(vectors):
        threshold = partition_into(Similarity(vectors, biases), count, clusters="components").threshold
        assert len(connect(vectors, biases, 1.0, threshold)[1]) >= count
        assert len(connect(vectors, biases, 1.0, threshold - 1e-8)[1]) < count


@pytest.mark.parametrize("clusters", CLUSTERS)
def test_a_similarity_at_a_threshold_far_beyond_the_tolerance_is_enough(clusters):
    s = Similarity(torch.eye(2), torch.tensor([0.0, 2.0**40]))
    assert partition(s, -(2.0**80), clusters=clusters).non_redundant.sum() == 1
    assert partition(s, -(2.0**79), clusters=clusters).non_redundant.sum() == 2


def test_a_chain_is_one_component_but_has_several_leaders():
    angles = 0.3 * torch.arange(7)
    s = Similarity(torch.stack([angles.cos(), angles.sin()], dim=1) * (7 - torch.arange(7))[:, None], torch.zeros(7))
    assert partition(s, 0.95).representative.tolist() == [0, 0, 2, 2, 4, 4, 6]
    assert partition(s, 0.95, clusters="components").representative.tolist() == [0] * 7
    assert partition(s, 0.96, clusters="components").representative.tolist() == list(range(7))


def test_components_beyond_the_limit_join_the_most_similar_one_kept():
    s = Similarity(torch.tensor([[9.0, 0.0], [0.0, 8.0], [1.0, 1.1], [1.0, 1.11], [-1.0, -2.0]]), torch.zeros(5))
    assert partition(s, 0.9, clusters="components").representative.tolist() == [0, 1, 3, 3, 4]
    assert partition(s, 0.9, clusters="components", limit=2).representative.tolist() == [0, 1, 1, 1, 0]


@pytest.mark.parametrize("clusters", CLUSTERS)
def test_no_more_than_a_tile_is_measured_and_kept(clusters):
    sizes, edges, merge = [], [], Forest.merge

    def products(a, biases_a, b, biases_b):
        sizes.append(len(a) * len(b))
        return a @ b.T

    def recorded(self, more, similarities):
        edges.append((len(self.edges), len(more)))
        return merge(self, more, similarities)

    s = Similarity(*random_group(0, units=150, inputs=8), measure=products)
    with in_tiles_of(16), patch.object(Forest, "merge", recorded):
        partition(s, -1.0, limit=50, clusters=clusters)
        partition_into(s, 50, clusters=clusters)
    assert max(sizes) == 16 * 16
    assert all(kept < 150 and new <= 16 * 16 for kept, new in edges)
    assert bool(edges) == (clusters == "components")


# Representatives at random


@given(cases(), st.sampled_from(CLUSTERS), st.sampled_from([None, 1, 3]), st.integers(0, 99))
def test_random_representatives_stand_for_the_same_clusters(case, clusters, limit, seed):
    group, bias_weight, threshold = case
    s = Similarity(*group, bias_weight)
    largest = partition(s, threshold, limit=limit, clusters=clusters)

    def draw():
        generator = torch.Generator().manual_seed(seed)
        options = {"clusters": clusters, "representative": "random", "generator": generator}
        return partition(s, threshold, limit=limit, **options), partition_into(s, 1, **options)

    before = torch.get_rng_state()
    drawn, single = draw()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(drawn.cluster, largest.cluster)
    assert torch.equal(drawn.cluster[drawn.representative], drawn.cluster)
    assert drawn.non_redundant.sum() == largest.non_redundant.sum() == drawn.cluster.max() + 1
    assert single.non_redundant.sum() == 1
    assert all(torch.equal(a.representative, b.representative) for a, b in zip((drawn, single), draw(), strict=True))


@pytest.mark.parametrize("clusters", CLUSTERS)
def test_every_member_represents_its_cluster_equally_often(clusters):
    s = Similarity(torch.eye(3)[[0, 1, 0, 2, 0, 1, 0]] * torch.arange(1, 8)[:, None], torch.zeros(7))
    counts = torch.zeros(7)
    for seed in range(400):
        generator = torch.Generator().manual_seed(seed)
        found = partition(s, 0.9, clusters=clusters, representative="random", generator=generator)
        counts += found.non_redundant
    assert counts.tolist() == pytest.approx([100, 200, 100, 400, 100, 200, 100], abs=45)


def test_random_representatives_need_a_generator():
    s = Similarity(*random_group(0))
    for split, value in ((partition, 0.5), (partition_into, 3)):
        with pytest.raises(ContinualError, match="'random' draws from a generator, got generator=None"):
            split(s, value, representative="random")


def test_clusters_are_numbered_in_the_order_of_their_first_units():
    assert Partition(torch.tensor([3, 1, 5, 3, 1, 5]), 0.5).cluster.tolist() == [0, 1, 2, 0, 1, 2]
    assert Partition(torch.tensor([3, 4, 3, 3, 4]), 0.5).cluster.tolist() == [0, 1, 0, 0, 1]
