import pytest
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from lightning_cf.errors import ContinualError
from lightning_cf.invariance.affine import Rotation, Scaling, Shear, Translation
from lightning_cf.invariance.perturbations import (
    Ablate,
    Affine,
    Compose,
    InSubspace,
    Mixture,
    Noise,
    Perturbation,
    Resample,
)
from lightning_cf.utilities.randomness import keyed_generator

PERTURBATIONS = [Resample(), Noise(), Noise(scale=0.1), Ablate()]
shapes = st.tuples(st.integers(1, 6), st.integers(1, 9))


def weights(shape, dtype=torch.float32):
    return torch.randn(shape, generator=keyed_generator("weights")).to(dtype)


@given(shapes, st.integers(0, 99), st.sampled_from([torch.float32, torch.float64]))
def test_resample_keeps_norms_and_changes_directions(shape, key, dtype):
    base = weights(shape, dtype)
    drawn = Resample()(base, keyed_generator(key))
    torch.testing.assert_close(drawn.norm(dim=1), base.norm(dim=1))
    if shape[1] > 1:
        assert (torch.cosine_similarity(drawn, base).abs() < 1 - 1e-6).any()


def test_resampled_directions_point_everywhere():
    drawn = Resample()(torch.ones(4000, 3), keyed_generator(0))
    assert drawn.mean(dim=0).abs().max() < 0.1
    torch.testing.assert_close(drawn.T @ drawn / 4000, torch.eye(3), rtol=0, atol=0.1)


def test_zero_vectors_stay_zero():
    for perturbation in PERTURBATIONS:
        assert not perturbation(torch.zeros(3, 4), keyed_generator(0)).any()


def test_ablate_silences():
    assert not Ablate()(weights((3, 4)), keyed_generator(0)).any()


@given(shapes)
def test_noise_of_scale_zero_is_the_identity(shape):
    assert torch.equal(Noise(scale=0.0)(weights(shape), keyed_generator(0)), weights(shape))


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_the_scale_is_the_length_of_the_noise_relative_to_the_vectors(scale):
    base = weights((5, 10_000)) * torch.tensor([[0.1], [1.0], [2.0], [5.0], [10.0]])
    noise = Noise(scale=scale)(base, keyed_generator(0)) - base
    torch.testing.assert_close(noise.norm(dim=1), scale * base.norm(dim=1), rtol=0.05, atol=0)


@pytest.mark.parametrize("scale", [-0.1, float("nan")])
def test_noise_of_negative_scale_is_refused(scale):
    with pytest.raises(ContinualError, match=f"Noise: scale must be a finite number of at least 0, got {scale}"):
        Noise(scale=scale)


@pytest.mark.parametrize("perturbation", PERTURBATIONS, ids=str)
def test_the_base_is_left_as_it_was_and_type_and_shape_are_kept(perturbation):
    base = weights((3, 4)).bfloat16()
    drawn = perturbation(base, keyed_generator(0))
    assert torch.equal(base, weights((3, 4)).bfloat16())
    assert (drawn.shape, drawn.dtype) == (base.shape, base.dtype)
    assert isinstance(perturbation, Perturbation)


@pytest.mark.parametrize("perturbation", PERTURBATIONS[:3], ids=str)
def test_the_generator_alone_decides(perturbation):
    state = torch.get_rng_state()
    draws = [perturbation(weights((3, 4)), keyed_generator(*key)) for key in [(0, "a"), (0, "a"), (0, "b"), (1, "a")]]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[3])
    assert torch.equal(torch.get_rng_state(), state)


# The contract, kept by all


def orthogonal(inputs, generator):
    return torch.linalg.qr(torch.randn(inputs, inputs, generator=generator).double()).Q


def ones(inputs, generator):
    return torch.ones(inputs)


EVERY = [
    *PERTURBATIONS,
    Rotation(30.0),
    Translation(0.5),
    Shear(2.0),
    Scaling(3.0),
    Affine(matrix=orthogonal, shift=ones),
    Compose([Rotation(60.0), Noise(), Affine(shift=ones)]),
    Mixture([Rotation(), Resample(), Shear()]),
    Mixture([Compose([Shear(), Ablate()]), Compose([Mixture([Scaling(), Rotation()]), Translation()])], [1.0, 3.0]),
]
EVERY = [*EVERY, *(InSubspace(perturbation, torch.eye(4)[:, 1:]) for perturbation in EVERY)]
RANDOM = [perturbation for perturbation in EVERY if "Ablate" not in str(perturbation)]


@pytest.mark.parametrize("perturbation", EVERY, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_disturbed_copies_are_of_the_bases_type_and_the_base_stays(perturbation, dtype):
    base = weights((30, 4), dtype)
    disturbed = perturbation(base, keyed_generator(0))
    assert torch.equal(base, weights((30, 4), dtype))
    assert (disturbed.shape, disturbed.dtype, disturbed.device) == (base.shape, base.dtype, base.device)
    assert (disturbed != base).any(dim=1).all()
    assert isinstance(perturbation, Perturbation)


@pytest.mark.parametrize("perturbation", RANDOM, ids=str)
def test_draws_depend_on_the_generator_alone(perturbation):
    state = torch.get_rng_state()
    draws = []
    for key in (0, 0, 1):
        draws.append(perturbation(weights((30, 4)), keyed_generator(key)))
        torch.rand(3)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    torch.set_rng_state(state)
    perturbation(weights((30, 4)), keyed_generator(0))
    assert torch.equal(torch.get_rng_state(), state)


HELD = InSubspace(Rotation(), orthogonal(400, keyed_generator(0))[:, :9])


@pytest.mark.parametrize("perturbation", [Rotation(30.0), Compose([Rotation(), Scaling()]), HELD], ids=str)
def test_low_precision_is_computed_in_full_and_rounded_once(perturbation):
    base = weights((30, 400)).bfloat16()
    expected = perturbation(base.float(), keyed_generator(0)).bfloat16()
    assert torch.equal(perturbation(base, keyed_generator(0)), expected)


# Given maps


@given(shapes)
def test_the_affine_map_is_the_one_given(shape):
    matrix, shift = weights((shape[1], shape[1])).double(), weights((shape[1],)).double()
    base = weights(shape, torch.float64)
    expected = torch.stack([matrix @ vector + shift for vector in base])
    for given_matrix, given_shift in [(matrix, shift), (matrix.tolist(), shift.tolist())]:
        drawn = Affine(matrix=given_matrix, shift=given_shift)(base, keyed_generator(0))
        torch.testing.assert_close(drawn, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(Affine(shift=shift)(base, keyed_generator(0)), base + shift, rtol=0, atol=0)
    assert torch.equal(Affine()(base, keyed_generator(0)), base)


def test_callables_make_the_map_for_each_width_from_the_generator():
    perturbation = Affine(matrix=lambda inputs, generator: torch.rand((), generator=generator) * torch.eye(inputs))
    for inputs in (2, 5):
        drawn = perturbation(torch.ones(3, inputs), keyed_generator(7))
        torch.testing.assert_close(drawn, torch.rand((), generator=keyed_generator(7)).expand(3, inputs))


@pytest.mark.parametrize(
    ("perturbation", "message"),
    [
        (Affine(matrix=torch.eye(3)), "Affine: matrix must be 5 x 5 for units of 5 inputs, got 3 x 3; give a callable"),
        (Affine(matrix=[[1.0] * 5]), "Affine: matrix must be 5 x 5 for units of 5 inputs, got 1 x 5; .* InSubspace"),
        (Affine(shift=[1, 2]), "Affine: shift must be 5 for units of 5 inputs, got 2; give a callable"),
        (Affine(shift=lambda inputs, _: torch.eye(inputs)), "Affine: shift must be 5 .* got 5 x 5"),
        (InSubspace(Ablate(), torch.eye(3)), "InSubspace: basis has 3 rows, the units have 5 inputs"),
    ],
)
def test_maps_for_another_width_are_refused(perturbation, message):
    with pytest.raises(ContinualError, match=message):
        perturbation(torch.ones(2, 5), keyed_generator(0))


def test_texts_tell_maps_apart_and_are_the_same_in_every_process():
    assert str(Affine(torch.eye(3))) == "Affine(matrix=<3 x 3 #1332df68>, shift=None)"
    assert str(Affine(torch.eye(3).double())) == str(Affine(torch.eye(3)))
    nearly = torch.eye(3, dtype=torch.float64)
    nearly[0, 0] += 1e-12
    assert str(Affine(nearly)) != str(Affine(torch.eye(3)))
    assert str(Affine(orthogonal)) == "Affine(matrix=<function orthogonal>, shift=None)"
    held = [str(InSubspace(Rotation(), basis)) for basis in (torch.eye(3)[:, :2], torch.eye(3)[:, 1:])]
    assert held[0].startswith("InSubspace(perturbation=Rotation(degrees=90.0), basis=<3 x 2 #")
    assert held[0] != held[1]


# Composition and mixture


def test_the_first_of_a_composition_is_first():
    double, add = Affine(matrix=[[2.0]]), Affine(shift=[1.0])
    base = torch.tensor([[3.0]])
    assert Compose([double, add])(base, keyed_generator(0)).item() == 7
    assert Compose([add, double])(base, keyed_generator(0)).item() == 8


@given(shapes, st.integers(0, 99))
def test_compositions_are_their_parts_in_turn_however_nested(shape, key):
    a, b, c = Rotation(40.0), Scaling(), Noise()
    generator = keyed_generator(key)
    expected = c(b(a(weights(shape), generator), generator), generator)
    for composed in (Compose([a, b, c]), Compose([Compose([a, b]), c]), Compose([a, Compose([b, c])])):
        assert torch.equal(composed(weights(shape), keyed_generator(key)), expected)


@pytest.mark.parametrize(("chances", "share"), [(None, 1 / 2), ([3.0, 1.0], 3 / 4), ([0.0, 1.0], 0.0)])
def test_units_draw_from_a_mixture_by_its_weights(chances, share):
    mixed = Mixture([Ablate(), Affine(shift=[1.0])], chances)(torch.ones(20_000, 1), keyed_generator(0))
    assert set(mixed.flatten().tolist()) <= {0.0, 2.0}
    assert float((mixed == 0).float().mean()) == pytest.approx(share, abs=0.02)


def test_units_of_a_mixture_draw_anew_each_time():
    draws = [Mixture([Ablate(), Affine()])(torch.ones(100, 1), keyed_generator(key)) for key in (0, 1)]
    assert 20 < int((draws[0] != draws[1]).sum()) < 80


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Compose([]), "Compose: perturbations must be at least one, got none"),
        (lambda: Mixture([]), "Mixture: perturbations must be at least one, got none"),
        (lambda: Mixture([Ablate()], [1.0, 2.0]), r"Mixture: weights must be 1 numbers .* got \[1.0, 2.0\]"),
        (lambda: Mixture([Ablate(), Noise()], [1.0, -1.0]), "Mixture: weights must be 2 numbers of at least 0"),
        (lambda: Mixture([Ablate()], [float("nan")]), "Mixture: weights must be"),
        (lambda: Mixture([Ablate()], [0.0]), "Mixture: weights must be .* not all 0"),
    ],
)
def test_empty_lists_and_weights_that_are_none_are_refused(make, message):
    with pytest.raises(ContinualError, match=message):
        make()


def composition(**more):
    affine = {"_target_": "lightning_cf.Affine", "matrix": [[0, 1], [1, 0]], "shift": [10.0, 0.0]}
    mixture = {"_target_": "lightning_cf.Mixture", "perturbations": [{"_target_": "lightning_cf.Ablate"}]}
    parts = [affine, {"_target_": "lightning_cf.Noise", "scale": 0.0}, mixture]
    return OmegaConf.create({"_target_": "lightning_cf.Compose", "perturbations": parts, **more})


def test_configs_make_them():
    made = instantiate(composition(_convert_="all"))
    assert made.perturbations[0](torch.tensor([[1.0, 2.0]]), keyed_generator(0)).tolist() == [[12.0, 1.0]]
    assert made.perturbations[1:] == (Noise(0.0), Mixture([Ablate()]))
    alone = instantiate(composition().perturbations[0])
    assert alone(torch.tensor([[1.0, 2.0]]), keyed_generator(0)).tolist() == [[12.0, 1.0]]


def test_configs_that_hydra_leaves_as_they_are_are_refused(unchecked):
    with pytest.raises(InstantiationException, match=r"Mixture: perturbations must be callable, .* _convert_: all"):
        instantiate(composition().perturbations[2])


# Sub-spaces

planes = st.tuples(st.integers(1, 5), st.integers(2, 6), st.integers(1, 4)).filter(lambda size: size[2] < size[1])


def held(size, key, dtype=torch.float32):
    """Vectors, and an orthonormal basis of a sub-space of theirs."""
    units, inputs, dimensions = size
    drawn = torch.randn(inputs, dimensions, generator=keyed_generator("basis", key)).double()
    return weights((units, inputs), dtype), torch.linalg.qr(drawn).Q.to(dtype)


@pytest.mark.parametrize("perturbation", EVERY[: len(EVERY) // 2], ids=str)
@given(size=planes, key=st.integers(0, 99))
def test_perturbations_stay_in_the_sub_space(perturbation, size, key):
    base, basis = held(size, key)
    moved = InSubspace(perturbation, basis)(base, keyed_generator(key)) - base
    assert (moved - moved @ basis @ basis.T).abs().max() < 1e-6 * max(1.0, float(moved.abs().max()))
    expected = perturbation(base @ basis, keyed_generator(key)) - base @ basis
    torch.testing.assert_close(moved @ basis, expected, rtol=1e-5, atol=1e-5)


@given(planes, st.integers(0, 99), st.sampled_from([Rotation(50.0), Resample()]))
def test_what_keeps_lengths_keeps_them_in_a_sub_space(size, key, perturbation):
    base, basis = held(size, key)
    drawn = InSubspace(perturbation, basis)(base, keyed_generator(key))
    torch.testing.assert_close(drawn.norm(dim=1), base.norm(dim=1))


@given(planes, st.integers(0, 99))
def test_maps_compose_in_a_sub_space_as_outside(size, key):
    base, basis = held(size, key, torch.float64)
    first, second = (Affine(orthogonal(size[2], keyed_generator(key, i)), [float(i)] * size[2]) for i in (1, 2))
    in_turn = Compose([InSubspace(first, basis), InSubspace(second, basis)])
    together = InSubspace(Compose([first, second]), basis)
    drawn = [perturbation(base, keyed_generator(0)) for perturbation in (in_turn, together)]
    torch.testing.assert_close(drawn[0], drawn[1], rtol=1e-12, atol=1e-12)
