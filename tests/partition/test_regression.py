import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from lightning_cf.network.layer_inputs import InputRecorder
from lightning_cf.partition import regression
from lightning_cf.partition.regression import Moments, Sample, Samples, fold, input_moments
from lightning_cf.utilities.randomness import keyed_generator

CONVOLUTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments_of(x):
    moments = Moments(torch.zeros(x.shape[1] + 1, x.shape[1] + 1, dtype=torch.float64))
    moments.update(x)
    return moments


def kept_inputs(data, inputs):
    return torch.tensor(data.draw(st.lists(st.booleans(), min_size=inputs, max_size=inputs)))


# Regression


@given(st.data(), st.integers(0, 99), st.booleans())
def test_fold_is_least_squares(data, seed, with_bias):
    x, weight, bias = normal(60, 7, seed=seed) + 1, normal(3, 7, seed=seed + 1), normal(3, seed=seed + 2)
    kept = kept_inputs(data, 7)
    assume(with_bias or kept.any())
    left = torch.cat([x[:, kept], torch.ones(60, 1).double()], dim=1) if with_bias else x[:, kept]
    change, *_ = np.linalg.lstsq(left.numpy(), (x[:, ~kept] @ weight[:, ~kept].T).numpy(), rcond=None)
    change = torch.from_numpy(change)
    folded, solved = fold(weight, bias if with_bias else None, moments_of(x), kept, ridge=1e-13)
    torch.testing.assert_close(folded[:, kept], weight[:, kept] + change[: int(kept.sum())].T, rtol=1e-6, atol=1e-6)
    if with_bias:
        torch.testing.assert_close(solved, bias + change[-1], rtol=1e-6, atol=1e-6)
    else:
        assert solved is None


@given(st.data(), st.integers(0, 99), st.sampled_from([1e-6, 1e-2, 1.0]))
def test_the_ridge_shrinks_the_change(data, seed, ridge):
    x, weight = normal(60, 6, seed=seed), normal(2, 6, seed=seed + 1)
    kept = kept_inputs(data, 6)
    assume(kept.any())
    penalty = (ridge * x[:, kept].square().mean() * 60).sqrt() * torch.eye(int(kept.sum()))
    left, right = torch.cat([x[:, kept], penalty]), x[:, ~kept] @ weight[:, ~kept].T
    change, *_ = np.linalg.lstsq(left.numpy(), functional.pad(right, (0, 0, 0, len(penalty))).numpy(), rcond=None)
    folded, _ = fold(weight, None, moments_of(x), kept, ridge=ridge)
    torch.testing.assert_close(folded[:, kept], weight[:, kept] + torch.from_numpy(change).T, rtol=1e-6, atol=1e-6)


@given(st.data(), st.integers(0, 99))
def test_the_rest_comes_back_as_zero_and_the_arguments_stay(data, seed):
    x, weight, bias = normal(20, 5, seed=seed), normal(3, 5, seed=seed + 1), normal(3, seed=seed + 2)
    before, kept = weight.clone(), kept_inputs(data, 5)
    folded, solved = fold(weight, bias, moments_of(x), kept)
    assert (folded[:, ~kept] == 0).all()
    assert torch.equal(weight, before)
    assert folded.isfinite().all()
    assert solved.isfinite().all()


@given(st.integers(0, 99), st.booleans())
def test_linear_combinations_are_folded_without_loss(seed, with_bias):
    kept = torch.tensor([True, False, True, True, False, False])
    x = torch.zeros(50, 6, dtype=torch.float64)
    x[:, kept] = normal(50, 3, seed=seed)
    x[:, ~kept] = x[:, kept] @ normal(3, 3, seed=seed + 1) + (normal(3, seed=seed + 2) if with_bias else 0)
    weight, bias = normal(4, 6, seed=seed + 3), normal(4, seed=seed + 4)
    folded, solved = fold(weight, bias if with_bias else None, moments_of(x), kept, ridge=1e-12)
    expected = functional.linear(x, weight, bias if with_bias else None)
    torch.testing.assert_close(functional.linear(x, folded, solved), expected, rtol=1e-6, atol=1e-6)


def test_nothing_changes_where_everything_is_kept():
    weight, bias = normal(3, 5), normal(3)
    folded, solved = fold(weight, bias, moments_of(normal(20, 5)), torch.ones(5, dtype=torch.bool))
    torch.testing.assert_close(folded, weight)
    torch.testing.assert_close(solved, bias)


def test_silent_inputs_are_no_problem():
    x = normal(20, 4)
    x[:, [0, 2]] = 0
    folded, _ = fold(normal(2, 4), None, moments_of(x), torch.tensor([True, False, True, True]))
    assert folded.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_result_has_the_type_of_the_weight(dtype):
    weight, bias = normal(2, 4).to(dtype), normal(2).to(dtype)
    folded, solved = fold(weight, bias, moments_of(normal(20, 4)), torch.tensor([True, False, True, True]))
    assert folded.dtype == solved.dtype == dtype


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 99))
def test_moments_do_not_depend_on_the_batches(sizes, seed):
    x = normal(sum(sizes), 3, seed=seed)
    moments = Moments(torch.zeros(4, 4, dtype=torch.float64))
    for batch in x.split(sizes):
        moments.update(batch)
    z = torch.cat([x, torch.ones(len(x), 1)], dim=1)
    torch.testing.assert_close(moments.matrix, z.T @ z / len(x))
    assert moments.count == len(x)


# Recording


class Recording:
    """What an InputRecorder saw of one weight."""

    def __init__(self, weight, **options):
        self.seen = []
        self.recorder = InputRecorder({"w": weight}, self.record, **options)

    def record(self, name, x, patches):
        self.seen.append((x, patches))


@st.composite
def convolutions(draw):
    """Input, kernel and options of a convolution that has at least one output position."""
    spatial = draw(st.integers(1, 3))

    def each(low, high):
        sizes = st.integers(low, high)
        return draw(st.one_of(sizes, st.tuples(*[sizes] * spatial)))

    kernel = draw(st.tuples(*[st.integers(1, 3)] * spatial))
    size = draw(st.tuples(*[st.integers(5, 7)] * spatial))
    padding = draw(st.sampled_from(["same", "valid", "number"]))
    options = {
        "stride": 1 if padding == "same" else each(1, 3),
        "padding": each(0, 2) if padding == "number" else padding,
        "dilation": each(1, 2),
    }
    batch, channels, outputs = (draw(st.integers(1, 3)) for _ in range(3))
    return normal(batch, channels, *size), normal(outputs, channels, *kernel, seed=1), options


def as_rows(output):
    return output.movedim(1, -1).flatten(0, -2)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@given(convolutions(), st.booleans())
def test_patches_times_the_flat_kernel_are_the_convolution(convolution, positional):
    x, weight, options = convolution
    recording, conv = Recording(weight), CONVOLUTIONS[weight.ndim - 2]
    with recording.recorder:
        output = conv(x, weight, None, *options.values()) if positional else conv(input=x, weight=weight, **options)
    ((channels, patches),) = recording.seen
    torch.testing.assert_close(patches @ weight.flatten(1).T, as_rows(output))
    assert torch.equal(channels, as_rows(x))


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect"])
def test_patches_of_a_layer_are_padded_as_it_pads(mode):
    layer = nn.Conv2d(2, 3, (3, 2), stride=(1, 2), padding=(1, 1), padding_mode=mode).double()
    recording = Recording(layer.weight)
    with recording.recorder, torch.no_grad():
        output = layer(normal(2, 2, 5, 6))
    ((_, patches),) = recording.seen
    torch.testing.assert_close(patches @ layer.weight.flatten(1).T + layer.bias, as_rows(output))


def test_many_patches_are_sampled_the_same_at_each_call():
    x, weight = normal(3, 2, 9, 9), normal(1, 2, 2, 2)
    whole, some, again = Recording(weight), Recording(weight, rows=50), Recording(weight, rows=50)
    for recording in (whole, some, again):
        with recording.recorder:
            functional.conv2d(x, weight)
    every, sample = ({tuple(row) for row in r.seen[0][1].tolist()} for r in (whole, some))
    assert len(sample) == 50
    assert sample < every
    assert torch.equal(some.seen[0][1], again.seen[0][1])
    chosen = torch.randperm(3 * 8 * 8, generator=keyed_generator("patches", 3 * 8 * 8))[:50]
    assert torch.equal(some.seen[0][1], whole.seen[0][1][chosen])


def test_a_linear_layer_gives_one_row_a_token():
    layer = nn.Linear(4, 2)
    recording, x = Recording(layer.weight), torch.randn(3, 5, 4)
    with recording.recorder:
        layer(x)
        functional.linear(input=x, weight=layer.weight)
    for inputs, patches in recording.seen:
        assert torch.equal(inputs, x.reshape(15, 4))
        assert torch.equal(patches, inputs)
    assert len(recording.seen) == 2


def test_other_weights_and_grouped_convolutions_are_left_out():
    layer, grouped = nn.Linear(4, 2), nn.Conv2d(4, 4, 1, groups=2)
    recording = Recording(grouped.weight)
    with recording.recorder:
        layer(torch.ones(1, 4))
        grouped(torch.ones(1, 4, 2, 2))
    assert recording.seen == []


def test_moments_are_those_of_the_inputs_over_all_passes():
    network = nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)).double()
    weights = {"conv": network[0].weight, "linear": network[3].weight}
    batches = normal(4, 2, 3, 3).split(2)
    moments = input_moments(weights, [lambda x=x: network(x) for x in batches])
    hidden = network[:3](torch.cat(batches)).detach()
    torch.testing.assert_close(moments["linear"].matrix, moments_of(hidden).matrix)
    assert moments["linear"].matrix.shape == (13, 13)
    assert (moments["linear"].count, moments["conv"].count) == (4, 16)
    assert moments["conv"].matrix.shape == (9, 9)


def test_a_sample_of_inputs_folds_like_their_moments():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 30, generator=generator)
    weight, bias = torch.randn(5, 30, generator=generator), torch.randn(5, generator=generator)
    moments = Moments(torch.zeros(31, 31, dtype=torch.float64))
    moments.update(x)
    sample = Sample(torch.cat([x, torch.ones(20, 1)], dim=1), 20)
    kept = torch.rand(30, generator=generator) < 0.5
    for found, wanted in zip(fold(weight, bias, sample, kept), fold(weight, bias, moments, kept), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


@given(st.data(), st.integers(0, 99), st.booleans(), st.sampled_from([0, 1e-4, 1e-2]))
def test_all_samples_fold_as_their_moments_do(data, seed, with_bias, ridge):
    """With fewer of them than inputs that are kept, and with more."""
    x, weight, bias = normal(12, 20, seed=seed), normal(3, 20, seed=seed + 1), normal(3, seed=seed + 2)
    kept, samples = kept_inputs(data, 20), Samples()
    assume(kept.any() and (ridge or kept.sum() < 10))
    for block in x.split([5, 4, 3]):
        samples.update(block)
    found, shift = fold(weight, bias if with_bias else None, samples, kept, ridge=ridge)
    wanted, wanted_shift = fold(weight, bias if with_bias else None, moments_of(x), kept, ridge=ridge)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(shift, wanted_shift, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("batches", "kept"), [(2, Samples), (3, Moments), (6, Moments)])
def test_samples_are_kept_while_they_are_fewer_than_a_wide_layers_inputs(monkeypatch, batches, kept):
    monkeypatch.setattr(regression, "NARROW", 10)
    network, x = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(12, 3)).double(), normal(5 * batches, 12)
    x[1, 3] = float("nan")
    seen = input_moments({"weight": network[1].weight}, [lambda x=x: network(x.clone()) for x in x.split(5)])["weight"]
    assert type(seen) is kept
    assert (seen.count, seen.left_out) == (5 * batches - 1, 1)
    finite = x[x.isfinite().all(dim=1)].relu()
    matrix = (seen.moments() if kept is Samples else seen).matrix
    torch.testing.assert_close(matrix, moments_of(finite).matrix)


def test_samples_are_not_kept_where_one_batch_has_more_of_them_than_there_are_inputs(monkeypatch):
    monkeypatch.setattr(regression, "NARROW", 10)
    layer = nn.Linear(12, 3)
    assert type(input_moments({"w": layer.weight}, [lambda: layer(torch.randn(13, 12))])["w"]) is Moments


def test_what_was_kept_of_samples_does_not_change_with_the_tensor_that_was_read():
    samples, x = Samples(), torch.ones(2, 3)
    samples.update(x)
    x.zero_()
    assert bool((samples.rows == 1).all())


def test_a_long_pass_over_the_data_is_logged(monkeypatch, caplog):
    caplog.set_level("INFO")
    layer = nn.Linear(12, 3)
    passes = [lambda: layer(torch.randn(4, 12))] * 3
    input_moments({"w": layer.weight}, passes)
    assert caplog.messages == []
    monkeypatch.setattr(regression, "QUIET", 0)
    input_moments({"w": layer.weight}, passes)
    assert caplog.messages == [f"{number} batches read, to fold 1 layers on what they read" for number in (1, 2, 3)]


def test_wide_layers_are_folded_on_a_sample(monkeypatch):
    monkeypatch.setattr(regression, "WIDE", 10)
    layer = torch.nn.Linear(12, 3)
    found = regression.input_moments({"weight": layer.weight}, [lambda: layer(torch.randn(300, 12)) for _ in range(20)])
    assert found["weight"].rows.shape == (1024, 13)
