from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_cf.errors import ContinualError
from lightning_cf.invariance.affine import AffineMaps, Rotation, Scaling, Shear, Translation
from lightning_cf.invariance.perturbations import Affine
from lightning_cf.utilities.randomness import keyed_generator

shapes = st.tuples(st.integers(1, 5), st.integers(1, 7))
keys = st.integers(0, 999)
angles = st.floats(-720, 720)
TIGHT = {"rtol": 1e-9, "atol": 1e-9}


def weights(shape, key="weights", dtype=torch.float64):
    return torch.randn(shape, generator=keyed_generator(key), dtype=torch.float64).to(dtype)


def random_maps(shape, key, shared=True):
    """Maps of every part at once; what they stretch least, they stretch by at least a half."""
    units, inputs = shape
    rank = key % 4
    left, right = weights((2, units, rank, inputs), key)
    size = left.flatten(1).norm(dim=1) * right.flatten(1).norm(dim=1)
    sign = 1 - 2 * (key % 2)
    return AffineMaps(
        scale=sign * (1 + weights((units,), key + 1).sigmoid()),
        left=left / (2 * size[:, None, None]),
        right=right,
        shift=weights(shape, key + 2),
        matrix=torch.linalg.qr(weights((inputs, inputs), key + 3)).Q if shared else None,
    )


def matrix_turning(inputs, generator):
    return torch.linalg.qr(torch.randn(inputs, inputs, generator=generator)).Q


def drawn_maps(shape, key):
    """Maps that a real perturbation draws."""
    kinds = [Rotation(77.0), Translation(0.5), Shear(1.5), Scaling(3.0), Affine(matrix_turning, [1.0] * shape[1])]
    return kinds[key % len(kinds)].maps(weights(shape), keyed_generator(key))


def any_maps(shape, key):
    return [random_maps(shape, key), random_maps(shape, key, shared=False), drawn_maps(shape, key)][key % 3]


def dense(maps):
    """The maps as matrices of homogeneous coordinates."""
    units, inputs = maps.shift.shape
    matrices = torch.zeros(units, inputs + 1, inputs + 1, dtype=torch.float64)
    shared = torch.eye(inputs, dtype=torch.float64) if maps.matrix is None else maps.matrix
    for unit in range(units):
        matrices[unit, :-1, :-1] = maps.scale[unit] * shared + maps.left[unit].T @ maps.right[unit]
        matrices[unit, :-1, -1] = maps.shift[unit]
        matrices[unit, -1, -1] = 1
    return matrices


# The group


@given(shapes, keys)
def test_maps_are_what_their_matrices_are(shape, key):
    maps, x = any_maps(shape, key), weights(shape, "x")
    expected = dense(maps) @ torch.cat([x, torch.ones(len(x), 1)], dim=1)[:, :, None]
    torch.testing.assert_close(maps(x), expected[:, :-1, 0], **TIGHT)


@given(shapes, keys, keys)
def test_composed_maps_apply_the_right_one_first(shape, first, second):
    a, b, x = any_maps(shape, first), any_maps(shape, second), weights(shape, "x")
    torch.testing.assert_close((a @ b)(x), a(b(x)), **TIGHT)
    torch.testing.assert_close(dense(a @ b), dense(a) @ dense(b), **TIGHT)


@given(shapes, keys, keys, keys)
def test_composition_is_associative(shape, first, second, third):
    a, b, c = any_maps(shape, first), any_maps(shape, second), any_maps(shape, third)
    torch.testing.assert_close(dense((a @ b) @ c), dense(a @ (b @ c)), **TIGHT)


@given(shapes, keys)
def test_the_identity_leaves_vectors_and_maps_as_they_are(shape, key):
    maps, x = any_maps(shape, key), weights(shape, "x")
    identity = AffineMaps.identity(x)
    assert torch.equal(identity(x), x)
    assert torch.equal(dense(identity @ maps), dense(maps))
    assert torch.equal(dense(maps @ identity), dense(maps))


@given(shapes, keys, keys)
def test_inverses_undo(shape, first, second):
    maps, x = any_maps(shape, first) @ any_maps(shape, second), weights(shape, "x")
    back = maps.inverse()
    torch.testing.assert_close(back(maps(x)), x, **TIGHT)
    torch.testing.assert_close(maps(back(x)), x, **TIGHT)
    torch.testing.assert_close(dense(back), torch.linalg.inv(dense(maps)), **TIGHT)
    torch.testing.assert_close(dense(back.inverse()), dense(maps), **TIGHT)


def test_maps_that_flatten_have_no_inverse():
    x = weights((4, 3))
    one = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    with pytest.raises(ContinualError, match="2 of 4 have no inverse, the first is that of unit 2; keep the vectors"):
        replace(AffineMaps.identity(x), scale=one).inverse()
    with pytest.raises(ContinualError, match="the matrix is singular"):
        Affine(matrix=[[1, 2], [2, 4]]).maps(weights((4, 2)), keyed_generator(0)).inverse()


@given(shapes, keys, st.sampled_from([torch.float32, torch.float64]))
def test_a_projection_has_no_inverse(shape, key, dtype):
    x = weights(shape, key, dtype)
    along = torch.nn.functional.normalize(x, dim=1)[:, None]
    with pytest.raises(ContinualError, match=f"{len(x)} of {len(x)} have no inverse, the first is that of unit 0"):
        replace(AffineMaps.identity(x), left=-along, right=along).inverse()


# Rotation


@given(shapes, keys, angles, st.sampled_from([torch.float32, torch.float64]), st.sampled_from([1e-30, 1.0, 1e6]))
def test_rotation_keeps_lengths(shape, key, degrees, dtype, size):
    base = weights(shape, key, dtype) * size
    turned = Rotation(degrees)(base, keyed_generator(key))
    close = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(turned.double().norm(dim=1), base.double().norm(dim=1), rtol=close, atol=0)


@given(st.tuples(st.integers(1, 5), st.integers(2, 7)), keys, st.floats(0, 180))
def test_rotation_turns_by_exactly_the_angle(shape, key, degrees):
    base = weights(shape, key)
    turned = Rotation(degrees)(base, keyed_generator(key))
    first, second = (torch.nn.functional.normalize(vectors, dim=1) for vectors in (base, turned))
    angle = 2 * torch.atan2((first - second).norm(dim=1), (first + second).norm(dim=1))  # precise at 0 and 180 too
    torch.testing.assert_close(angle.rad2deg(), torch.full_like(angle, degrees), rtol=0, atol=1e-8)


@given(shapes, keys, angles, angles)
def test_rotations_of_one_plane_add_up(shape, key, first, second):
    base = weights(shape, key)
    a, b, both = (Rotation(d).maps(base, keyed_generator(key)) for d in (first, second, first + second))
    torch.testing.assert_close(dense(b @ a), dense(both), **TIGHT)
    torch.testing.assert_close(b(a(base)), both(base), **TIGHT)
    back = Rotation(-first).maps(base, keyed_generator(key))
    torch.testing.assert_close(dense(a.inverse()), dense(back), **TIGHT)


def test_rotation_turns_a_plane_and_nothing_else():
    base = weights((3, 6))
    turns = dense(Rotation(50.0).maps(base, keyed_generator(0)))[:, :-1, :-1]
    torch.testing.assert_close(turns @ turns.mT, torch.eye(6, dtype=torch.float64).expand(3, 6, 6), **TIGHT)
    moved = torch.linalg.matrix_rank(turns - torch.eye(6), atol=1e-9, rtol=0)
    assert moved.tolist() == [2, 2, 2]


def spread(perturbation):
    """Mean and covariance of what 20000 units of one base vector are moved by."""
    base = torch.tensor([[1.0, 2.0, 2.0]]) / 3
    moved = perturbation(base.expand(20_000, 3), keyed_generator("spread")) - base
    return base[0], moved.mean(dim=0), moved.T @ moved / len(moved)


def test_rotations_go_in_every_direction_across_the_vector():
    base, mean, square = spread(Rotation(90.0))  # moved by e - w, where e is uniform on the circle across w
    torch.testing.assert_close(mean, -base, rtol=0, atol=0.03)
    along = torch.outer(base, base)
    torch.testing.assert_close(square, (torch.eye(3) - along) / 2 + along, rtol=0, atol=0.03)


def test_translations_go_in_every_direction():
    _, mean, square = spread(Translation(2.0))
    torch.testing.assert_close(mean, torch.zeros(3), rtol=0, atol=0.06)
    torch.testing.assert_close(square, 4 * torch.eye(3) / 3, rtol=0, atol=0.1)


# Translation, Shear, Scaling


@given(shapes, keys, st.floats(0, 10))
def test_translation_moves_by_the_length_relative_to_the_vectors(shape, key, length):
    base = weights(shape, key)
    maps = Translation(length).maps(base, keyed_generator(key))
    torch.testing.assert_close((maps(base) - base).norm(dim=1), length * base.norm(dim=1), **TIGHT)
    torch.testing.assert_close(maps(2 * base) - 2 * base, maps(base) - base, **TIGHT)


def test_units_are_translated_each_its_own_way():
    moved = Translation()(torch.ones(2, 50), keyed_generator(0)) - 1
    assert torch.cosine_similarity(moved[0], moved[1], dim=0).abs() < 0.6


@given(st.tuples(st.integers(1, 5), st.integers(2, 7)), keys, st.floats(-5, 5))
def test_shear_keeps_the_component_along_the_vector(shape, key, factor):
    base = weights(shape, key)
    maps = Shear(factor).maps(base, keyed_generator(key))
    moved = maps(base) - base
    torch.testing.assert_close(moved.norm(dim=1), abs(factor) * base.norm(dim=1), **TIGHT)
    torch.testing.assert_close((moved * base).sum(dim=1), torch.zeros(len(base)).double(), **TIGHT)
    torch.testing.assert_close(maps(base + moved), base + 2 * moved, **TIGHT)  # what lies across is carried along
    torch.testing.assert_close(torch.linalg.det(dense(maps)), torch.ones(len(base)).double(), **TIGHT)


@given(shapes, keys, st.floats(1, 10))
def test_scaling_keeps_directions_and_bounds_factors(shape, key, factor):
    base = weights(shape, key)
    scaled = Scaling(factor)(base, keyed_generator(key))
    by = scaled.norm(dim=1) / base.norm(dim=1)
    torch.testing.assert_close(scaled, by[:, None] * base, **TIGHT)
    assert (by <= factor * (1 + 1e-9)).all()
    assert (by >= (1 - 1e-9) / factor).all()


def test_scaling_factors_are_log_uniform():
    logs = Scaling(4.0)(torch.ones(20_000, 1), keyed_generator(0)).log() / torch.log(torch.tensor(4.0))
    shares = torch.histc(logs, bins=4, min=-1, max=1) / len(logs)
    torch.testing.assert_close(shares, torch.full((4,), 0.25), rtol=0, atol=0.03)


# Degenerate units and options


@pytest.mark.parametrize("perturbation", [Rotation(), Shear()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_units_of_one_input_have_no_plane_and_stay(perturbation, dtype):
    base = weights((50, 1), dtype=dtype)
    assert torch.equal(perturbation(base, keyed_generator(0)), base)


@pytest.mark.parametrize("perturbation", [Rotation(), Translation(), Shear(), Scaling()], ids=str)
def test_zero_vectors_stay_while_their_neighbours_move(perturbation):
    base = weights((3, 4)) * torch.tensor([[1.0], [0.0], [1.0]])
    disturbed = perturbation(base, keyed_generator(0))
    assert (disturbed != base).any(dim=1).tolist() == [True, False, True]


@pytest.mark.parametrize("perturbation", [Rotation(), Translation(), Shear()], ids=str)
def test_a_zero_vector_draws_the_identity(perturbation):
    maps = perturbation.maps(torch.zeros(2, 4, dtype=torch.float64), keyed_generator(0))
    assert torch.equal(dense(maps), torch.eye(5, dtype=torch.float64).expand(2, 5, 5))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rotation(float("nan")), "Rotation: degrees must be a finite number, got nan"),
        (lambda: Rotation(float("inf")), "Rotation: degrees must be a finite number, got inf"),
        (lambda: Translation(-1.0), "Translation: length must be a finite number of at least 0, got -1.0"),
        (lambda: Shear(float("-inf")), "Shear: factor must be a finite number, got -inf"),
        (lambda: Scaling(0.5), "Scaling: factor must be a finite number of at least 1, got 0.5"),
    ],
)
def test_options_that_make_no_map_are_refused(make, message):
    with pytest.raises(ContinualError, match=message):
        make()
