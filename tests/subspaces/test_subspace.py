import math
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from lightning_cf.errors import ContinualError
from lightning_cf.subspaces.subspace import GivenSubspace, LearnedSubspace, RandomSubspace, Subspace, count_of
from lightning_cf.utilities.randomness import keyed_generator

sizes = st.tuples(st.integers(1, 12), st.integers(1, 12))


def normal(*shape, key=0):
    return torch.randn(shape, generator=keyed_generator("matrix", key), dtype=torch.float64)


def outside(vectors, basis):
    """How much of the columns of ``vectors`` is not in the span of ``basis``, as a share of their length."""
    vectors, basis = vectors.double(), basis.double()
    return float((vectors - basis @ (basis.T @ vectors)).norm() / vectors.norm())


def assert_orthonormal(basis):
    torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]), rtol=0, atol=1e-6)


# Given


@given(sizes, st.integers(0, 4), st.integers(0, 99), st.sampled_from([1e-20, 1.0, 1e20]))
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
def test_what_spans_may_depend(dtype, rounding, size, more, key, scale):
    inputs, rank = max(size), min(size)
    spanning = normal(inputs, rank, key=key) + 2 * torch.eye(inputs, rank, dtype=torch.float64)
    assume(float(torch.linalg.cond(spanning)) < 100)
    weights = normal(rank, more, key=key + 1)
    dependent = spanning @ weights
    columns = torch.cat([spanning.to(dtype), spanning.to(dtype) @ weights.to(dtype)], dim=1)
    order = torch.randperm(rank + more, generator=keyed_generator(key))
    basis = GivenSubspace({"a": scale * columns[:, order]}).basis("a", inputs, {})
    assert basis.shape == (inputs, rank)
    assert basis.dtype == torch.float32
    assert_orthonormal(basis)
    assert outside(torch.cat([spanning, dependent], dim=1), basis) < rounding


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.bfloat16, torch.float16])
def test_matrices_of_any_type_span(dtype):
    basis = GivenSubspace({"a": torch.tensor([[1, 0], [1, 0], [0, 1]]).to(dtype)}).basis("a", 3, {})
    projector = torch.tensor([[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]])
    torch.testing.assert_close(basis @ basis.T, projector, rtol=0, atol=1e-6)


def test_rounding_in_the_type_that_was_given_is_no_direction():
    columns = normal(64, 5).bfloat16()
    summed = (columns[:, :1] + columns[:, 1:2]).bfloat16()  # off by rounding, about a part in 500
    assert GivenSubspace({"a": torch.cat([columns, summed], dim=1)}).basis("a", 64, {}).shape == (64, 5)
    assert GivenSubspace({"a": torch.cat([columns, summed], dim=1).double()}).basis("a", 64, {}).shape == (64, 6)


def test_more_columns_than_inputs_span_every_direction():
    basis = GivenSubspace({"a": normal(3, 10)}).basis("a", 3, {})
    torch.testing.assert_close(basis @ basis.T, torch.eye(3), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "matrix",
    [
        torch.zeros(4, 2),
        torch.zeros(4, 0),
        torch.zeros(0, 3),
        torch.full((4, 2), float("nan")),
        torch.tensor([[float("inf"), 0.0], [0.0, 1.0]]),
        torch.tensor([[1.0, float("nan")]]),
    ],
    ids=["zero", "no column", "no input", "nan", "inf", "one nan"],
)
def test_a_matrix_that_spans_nothing_or_is_not_finite_is_refused(matrix):
    with pytest.raises(ContinualError, match=r"the basis of 'net.1' spans no direction, or is not finite"):
        GivenSubspace({"net.1": matrix})


@pytest.mark.parametrize("bases", [{"a": torch.ones(3)}, {"a": [[1.0]]}, [torch.eye(2)], 3], ids=str)
def test_what_is_no_mapping_to_matrices_is_refused(bases, unchecked):
    with pytest.raises(ContinualError, match="bases must map each layer to a matrix"):
        GivenSubspace(bases)


def test_a_file_is_read(tmp_path):
    bases = {"a": normal(5, 2), "b": normal(4, 3)}
    torch.save(bases, tmp_path / "bases.pt")
    direct = GivenSubspace(bases)
    for path in (tmp_path / "bases.pt", str(tmp_path / "bases.pt")):
        read = GivenSubspace(path)
        assert all(
            torch.equal(read.basis(layer, n, {}), direct.basis(layer, n, {})) for layer, n in (("a", 5), ("b", 4))
        )
        assert str(read) == str(direct)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ContinualError, match=r"there is no file .*none\.pt"):
        GivenSubspace(tmp_path / "none.pt")


def test_layers_that_are_not_named_move_in_every_direction():
    assert GivenSubspace({"a": torch.eye(3)}).basis("b", 7, {}) is None


def test_vectors_of_another_length_and_strange_layers_are_refused():
    subspace = GivenSubspace({"a": torch.eye(3), "b": torch.eye(3)})
    with pytest.raises(ContinualError, match="the basis of 'a' has 3 rows, but weight vectors there have 4 entries"):
        subspace.basis("a", 4, {})
    with pytest.raises(ContinualError, match=r"a basis for 'b', .* it has a, c"):
        subspace.check_layers(["c", "a"])
    subspace.check_layers(iter(["b", "a", "c"]))


def test_what_was_given_may_change_later():
    matrix = torch.eye(4, 2)
    subspace = GivenSubspace({"a": matrix})
    before = subspace.basis("a", 4, {}).clone()
    matrix.fill_(1.0)
    assert torch.equal(subspace.basis("a", 4, {}), before)


def test_texts_tell_given_sub_spaces_apart():
    matrix = normal(6, 3)
    nearly = matrix.clone()
    nearly[0, 0] += 1e-12
    same = [
        GivenSubspace({"a": matrix, "b": matrix}),
        GivenSubspace({"b": matrix.clone(), "a": matrix.T.contiguous().T}),
    ]
    other = [{"a": matrix}, {"a": matrix, "c": matrix}, {"a": matrix, "b": nearly}, {"a": nearly, "b": matrix}]
    assert str(same[0]) == str(same[1])
    assert str(same[0]).startswith("GivenSubspace(layers=['a', 'b'], sha256=")
    assert len({str(subspace) for subspace in [*same, *map(GivenSubspace, other)]}) == 5


def test_given_sub_spaces_may_be_compared_and_be_keys():
    first, second = (GivenSubspace({"a": torch.eye(3)}) for _ in range(2))
    assert len({first, second, first}) == 2


# Random


@given(sizes, st.integers(0, 99), st.sampled_from([1, 3, 100, 0.01, 0.5, 1.0]))
def test_random_bases_are_orthonormal_and_of_the_size_asked(size, key, dimensions):
    inputs, _ = size
    basis = RandomSubspace(dimensions, seed=key).basis("layer", inputs, {})
    wanted = min(inputs, dimensions) if isinstance(dimensions, int) else max(1, math.ceil(dimensions * inputs))
    assert basis.shape == (inputs, wanted)
    assert basis.dtype == torch.float32
    assert_orthonormal(basis)


def test_random_bases_depend_on_seed_and_layer_alone():
    state = torch.get_rng_state()
    bases = [RandomSubspace(2, seed).basis(layer, 9, {}) for seed, layer in [(0, "a"), (0, "a"), (1, "a"), (0, "b")]]
    assert torch.equal(bases[0], bases[1])
    assert all(outside(other, bases[0]) > 0.1 for other in bases[2:])
    assert torch.equal(torch.get_rng_state(), state)


def test_every_sub_space_is_equally_likely():
    projectors = []
    for seed in range(600):
        basis = RandomSubspace(2, seed).basis("a", 5, {})
        projectors.append(basis @ basis.T)
    torch.testing.assert_close(torch.stack(projectors).mean(0), 0.4 * torch.eye(5), rtol=0, atol=0.06)


# Learned


def test_what_was_learned_is_handed_out():
    basis = torch.eye(4, 2)
    assert torch.equal(LearnedSubspace().basis("a", 4, {"a": basis, "b": torch.eye(3)}), basis)
    assert LearnedSubspace().basis("a", 4, {"b": basis}) is None


@pytest.mark.parametrize("steps", [0, -1, 2.0, True])
def test_a_window_of_nothing_is_refused(steps, unchecked):
    with pytest.raises(ContinualError, match=f"subspace: steps must be a whole number of at least 1, got {steps}"):
        LearnedSubspace(steps=steps)


# How many dimensions


@given(st.integers(1, 1000), st.integers(1, 5000))
def test_shares_are_rounded_up_exactly(thousandths, inputs):
    expected = math.ceil(Fraction(thousandths, 1000) * inputs)
    assert count_of(thousandths / 1000, inputs) == expected


@given(st.integers(1, 50), st.integers(1, 50))
def test_whole_numbers_are_capped(dimensions, inputs):
    assert count_of(dimensions, inputs) == min(dimensions, inputs)


@pytest.mark.parametrize("kind", [RandomSubspace, LearnedSubspace])
@pytest.mark.parametrize("dimensions", [0, -1, 0.0, -0.5, 1.5, float("nan"), float("inf"), True, "half", None])
def test_dimensions_that_are_none_are_refused(kind, dimensions, unchecked):
    with pytest.raises(ContinualError, match=r"dimensions must be a share in .* or a whole number of at least 1, got"):
        kind(dimensions=dimensions)


def test_one_is_a_dimension_and_one_point_nought_is_all():
    assert RandomSubspace(1).basis("a", 5, {}).shape == (5, 1)
    assert RandomSubspace(1.0).basis("a", 5, {}).shape == (5, 5)


@pytest.mark.parametrize("subspace", [GivenSubspace({"a": torch.eye(2)}), RandomSubspace(), LearnedSubspace()], ids=str)
def test_all_are_sub_spaces(subspace):
    assert isinstance(subspace, Subspace)
