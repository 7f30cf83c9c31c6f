import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_cf.errors import ContinualError
from lightning_cf.perturbation import Ablate, Noise, Perturbation, Resample
from lightning_cf.randomness import keyed_generator

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
    with pytest.raises(ContinualError, match=f"Noise: scale must be at least 0, got {scale}"):
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
