import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_cf.utilities.randomness import derive_seed, isolated_generators, keyed_generator, seed_all, seed_torch

keys = st.lists(st.one_of(st.integers(), st.text(max_size=5)), max_size=4)


@given(keys)
def test_a_seed_fits_63_bits_and_depends_on_the_key_alone(key):
    assert 0 <= derive_seed(*key) < 2**63
    assert derive_seed(*key) == derive_seed(*key)


@given(keys, keys)
def test_other_keys_give_other_seeds(one, other):
    assert (derive_seed(*one) == derive_seed(*other)) == (one == other)


def test_a_number_is_not_its_digits_and_parts_are_not_joined():
    assert len({derive_seed(*key) for key in [(1,), ("1",), (1, 1), (11,), ("1", "1"), ("11",), ()]}) == 7


def test_every_process_gets_the_same_seed():
    assert derive_seed(0, "noise", 3) == 1971917787806227002


def test_generators_of_one_key_draw_the_same():
    draws = [torch.rand(3, generator=keyed_generator(*key)) for key in [(0, "a"), (0, "a"), (0, "b")]]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_the_global_generator_is_left_alone():
    state = torch.get_rng_state()
    torch.rand(3, generator=keyed_generator(0))
    assert torch.equal(torch.get_rng_state(), state)


def test_seeding_is_torchs_own():
    with torch.random.fork_rng():
        torch.manual_seed(7)
        wanted = torch.rand(3)
        seed_torch(7)
        assert torch.equal(torch.rand(3), wanted)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there are devices to seed")
def test_seeding_notes_nothing_for_devices_that_are_not_there():
    before = len(torch.cuda._queued_calls)  # which grow until the process ends
    with torch.random.fork_rng():
        seed_torch(7)
    assert len(torch.cuda._queued_calls) == before


def test_all_global_generators_draw_the_same_from_one_seed():
    before = drawn()
    with isolated_generators():
        seed_all(2**40)
        first = drawn()
        seed_all(2**40)
        assert drawn() == first != before


def drawn():
    return float(torch.rand(())), float(np.random.rand()), random.random()
