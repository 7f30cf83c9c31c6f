import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from references import similarity, unit_groups

from lightning_cf.errors import ContinualError
from lightning_cf.similarity import Similarity

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
