"""Samples whose structure is broken: what they are made of, and what is left as it was."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_cf.task_inference.variants import (
    ROTATIONS,
    changed,
    differs,
    exchanged,
    mirrored,
    permuted,
    strange,
)

SHAPES = [(6,), (1, 8, 8), (3, 6, 4), (5, 9), (2, 3, 4, 5), (2,)]


def generator(seed):
    return torch.Generator().manual_seed(seed)


def numbered(shape, batch=8):
    """Every value but once."""
    count = batch * int(torch.tensor(shape).prod())
    return torch.arange(count).reshape(batch, *shape)


@given(seed=st.integers(0, 10_000), shape=st.sampled_from(SHAPES))
@settings(max_examples=60, deadline=None)
def test_a_block_of_another_sample_takes_the_place_of_ones_own(seed, shape):
    x = numbered(shape)
    found = exchanged(x, generator(seed))
    size = x[0].numel()
    for number, sample in enumerate(found):
        taken = sample != x[number]
        places = taken.nonzero()
        assert 0 < len(places) < size or size == 1
        assert len((sample[taken] // size).unique()) == 1  # from one sample
        assert number not in sample[taken] // size
        assert torch.equal(sample % size, x[number] % size)  # at the place where it was
        low, high = places.amin(dim=0), places.amax(dim=0)
        assert int((high - low + 1).prod()) == len(places)  # a block
        cut = [d for d in range(len(shape)) if int(high[d] - low[d]) + 1 < shape[d]]
        assert all(0.3 * shape[d] - 0.5 <= int(high[d] - low[d]) + 1 <= 0.7 * shape[d] + 0.5 for d in cut)


@given(seed=st.integers(0, 10_000), shape=st.sampled_from(SHAPES))
@settings(max_examples=60, deadline=None)
def test_blocks_in_another_order_are_the_samples_own_values(seed, shape):
    x = numbered(shape)
    found = permuted(x, generator(seed))
    assert torch.equal(found.flatten(1).sort(dim=1).values, x.flatten(1))
    assert bool(differs(x, found).all())
    moved = sum(int((found.diff(dim=d + 1) != x.diff(dim=d + 1)).flatten(1).any(1).sum()) for d in range(len(shape)))
    assert moved >= len(x)


@given(seed=st.integers(0, 10_000), shape=st.sampled_from(SHAPES))
@settings(max_examples=60, deadline=None)
def test_a_block_is_reversed_and_what_lies_around_it_stays(seed, shape):
    x = numbered(shape)
    found = mirrored(x, generator(seed))
    assert torch.equal(found.flatten(1).sort(dim=1).values, x.flatten(1))
    assert bool(differs(x, found).all())
    for dim in range(1, x.ndim):
        for number in range(len(x)):
            # The places along a dimension, read off one line of a sample.
            others = [d for d in range(1, x.ndim) if d != dim]
            step = x[0].stride(dim - 1)
            line = (found[number].amin(dim=[d - 1 for d in others]) if others else found[number]) - x[number].min()
            places = line // step % x.shape[dim]
            moved = (places != torch.arange(len(places))).nonzero().flatten()
            if len(moved):
                low, high = int(moved.min()), int(moved.max())
                assert torch.equal(places[low : high + 1], torch.arange(high, low - 1, -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_strange_samples_keep_type_and_values(dtype):
    x = (100 * torch.rand(16, 1, 6, 6, generator=generator(1))).to(dtype)
    before = x.clone()
    found = strange(x, generator(0))
    assert found.dtype == dtype
    assert found.shape == x.shape
    assert torch.equal(x, before)
    assert set(found.flatten().tolist()) <= set(x.flatten().tolist())
    assert torch.equal(found, strange(x, generator(0)))
    assert dtype == torch.bool or not torch.equal(found, strange(x, generator(1)))


def test_one_in_ten_holds_a_block_of_another_sample():
    x = numbered((1, 8, 8), batch=500)
    own = (strange(x, generator(0)) // 64 == torch.arange(500).reshape(-1, 1, 1, 1)).flatten(1).all(dim=1)
    assert 25 < int((~own).sum()) < 75


def test_nothing_is_drawn_from_the_global_generator():
    before = torch.get_rng_state()
    strange(torch.rand(4, 5, generator=generator(0)), generator(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_samples_that_come_out_as_they_were_are_told():
    x = torch.zeros(4, 6)
    x[0] = torch.arange(6)
    assert differs(x, permuted(x, generator(0))).tolist() == [True, False, False, False]
    assert not differs(x[:1], exchanged(x[:1], generator(0))).any()  # no other sample to take from


def test_rotations_turn_the_last_two_dimensions_of_the_first_tensor():
    x, y = torch.rand(2, 3, 4, 4), torch.tensor([0, 1])
    turned, labels = changed([x, y], "rotated_90")
    assert torch.equal(changed(([x, x], y), "rotated_90")[0][0], turned)  # the first of nested ones
    assert torch.equal(turned, x.rot90(1, (2, 3)))
    assert labels is y
    for name, quarters in zip(ROTATIONS, (1, 2, 3), strict=True):
        assert torch.equal(changed(x, name), x.rot90(quarters, (2, 3)))
    assert torch.equal(changed((x, y), "mirrored")[0], x.flip(3))
