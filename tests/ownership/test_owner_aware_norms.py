import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lightning_cf.ownership.levels import FREE, NO_OWNER
from lightning_cf.ownership.nested_norms import Nesting, nested_group_norm, nested_layer_norm, nested_rms_norm
from lightning_cf.ownership.owner_aware_norms import make_owner_aware


def drawn(shape, owners, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.tensor([NO_OWNER, FREE, *range(owners)])[torch.randint(owners + 2, shape, generator=generator)]


def read_by(owner, other):
    """Whether what ``owner`` has is normalised with what ``other`` has."""
    rank = {NO_OWNER: -1, FREE: 10**9}
    return rank.get(other, other) <= rank.get(owner, owner)


def slow_layer_norm(x, owners, eps, centred=True):
    """Element by element, by the plain formula."""
    flat, out = x.flatten(x.ndim - owners.ndim), torch.empty_like(x.flatten(x.ndim - owners.ndim))
    for place, owner in enumerate(owners.flatten().tolist()):
        inside = torch.tensor([read_by(owner, other) for other in owners.flatten().tolist()])
        values = flat[..., inside]
        mean = values.mean(-1) if centred else 0.0
        variance = (values - (mean[..., None] if centred else 0.0)).square().mean(-1)
        out[..., place] = (flat[..., place] - mean) / (variance + eps).sqrt()
    return out.reshape(x.shape)


NORMS = {
    "layer": lambda x, owners: nested_layer_norm(x, Nesting(owners)),
    "rms": lambda x, owners: nested_rms_norm(x, Nesting(owners)),
    "group": lambda x, owners: nested_group_norm(x[..., None], 3, Nesting(owners))[..., 0],
}


@given(st.integers(1, 5), st.integers(2, 40), st.integers(0, 4), st.integers(0, 99))
def test_layer_and_rms_norms_equal_the_plain_formula(batch, width, owners, seed):
    owner = drawn((width,), owners, seed)
    x = torch.randn(batch, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    weight, bias = torch.rand(width, dtype=torch.float64) + 0.5, torch.randn(width, dtype=torch.float64)
    found = nested_layer_norm(x, Nesting(owner), weight, bias, 1e-3)
    torch.testing.assert_close(found, slow_layer_norm(x, owner, 1e-3) * weight + bias)
    found = nested_rms_norm(x, Nesting(owner), weight, 1e-3)
    torch.testing.assert_close(found, slow_layer_norm(x, owner, 1e-3, centred=False) * weight)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 6), st.integers(0, 4), st.integers(0, 99))
def test_group_norms_equal_the_plain_formula(batch, groups, size, owners, seed):
    owner = drawn((groups * size,), owners, seed)
    x = torch.randn(batch, groups * size, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    found = nested_group_norm(x, groups, Nesting(owner), eps=1e-3)
    for group in range(groups):
        part = slice(group * size, (group + 1) * size)
        spread = owner[part, None, None].expand(-1, 3, 2)
        torch.testing.assert_close(found[:, part], slow_layer_norm(x[:, part], spread, 1e-3))


@pytest.mark.parametrize("norm", NORMS)
def test_owned_by_one_task_they_are_the_plain_norms(norm):
    x, owner = torch.randn(5, 12), torch.zeros(12, dtype=torch.int64)
    plain = {
        "layer": F.layer_norm(x, (12,)),
        "rms": F.rms_norm(x, (12,)),
        "group": F.group_norm(x[..., None], 3)[..., 0],
    }
    torch.testing.assert_close(NORMS[norm](x, owner), plain[norm])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("value", [3.0, float("inf"), float("nan")])
def test_what_is_owned_does_not_depend_on_free_and_later_elements(norm, value):
    for seed in range(5):
        x, owner = torch.randn(7, 33), drawn((33,), 3, seed)
        other = torch.where((owner == FREE) | (owner == 2), torch.randn(7, 33) * value, x)
        kept = (owner != FREE) & (owner != 2)
        assert torch.equal(NORMS[norm](x, owner)[:, kept], NORMS[norm](other, owner)[:, kept])


@pytest.mark.parametrize("norm", NORMS)
def test_what_is_owned_stays_bitwise_when_free_elements_are_claimed(norm):
    for seed in range(5):
        x, owner = torch.randn(7, 33), torch.full((33,), FREE)
        generator, before = torch.Generator().manual_seed(seed), {}
        for task in range(5):
            claimed = (torch.rand(33, generator=generator) < 0.3) & (owner == FREE)
            owner[claimed] = task
            after = NORMS[norm](x, owner)
            for known, values in before.items():
                assert torch.equal(after[:, owner == known], values), (task, known)
            before[task] = after[:, claimed]


@pytest.mark.parametrize("norm", NORMS)
def test_gradients_are_those_of_the_formula(norm):
    x, owner = torch.randn(2, 9, dtype=torch.float64, requires_grad=True), drawn((9,), 2, 1)
    assert torch.autograd.gradcheck(lambda x: NORMS[norm](x, owner), (x,))


def test_statistics_of_low_precision_are_taken_in_single():
    x, owner = torch.randn(4, 16).bfloat16(), drawn((16,), 2)
    found = nested_layer_norm(x, Nesting(owner))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, nested_layer_norm(x.float(), Nesting(owner)).bfloat16())


# On modules


class Permuting(nn.LayerNorm):
    """A norm over channels that lie on axis 1."""

    def forward(self, x):
        return F.layer_norm(x.movedim(1, -1), self.normalized_shape, self.weight, self.bias, self.eps).movedim(-1, 1)


class Calling(nn.Module):
    """Normalises by a function, beside a child that does as well."""

    def __init__(self):
        super().__init__()
        self.child = nn.LayerNorm(8)

    def forward(self, x):
        return F.layer_norm(x, (8,)) + self.child(x)


OWNERS = torch.tensor([0, 0, 0, 1, 1, FREE, FREE, FREE])


@pytest.mark.parametrize("make", [nn.LayerNorm, nn.RMSNorm, lambda width: nn.GroupNorm(2, width)], ids=["l", "r", "g"])
def test_a_module_becomes_owner_aware_and_plain_again(make):
    norm, x = make(8), torch.randn(4, 8)
    plain, names, kind = norm(x), list(norm.state_dict()), type(norm)
    make_owner_aware(norm, {"": OWNERS})
    assert isinstance(norm, kind)
    assert list(norm.state_dict()) == names
    assert not dict(norm.named_buffers())
    assert not torch.equal(norm(x), plain)
    other = torch.where(OWNERS == FREE, torch.randn(4, 8), x)
    assert torch.equal(norm(other)[:, OWNERS >= 0], norm(x)[:, OWNERS >= 0])
    for copied in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert type(copied) is type(norm)
        assert torch.equal(copied(x), norm(x))
    make_owner_aware(norm, {"": torch.full((8,), FREE)})
    assert type(norm) is kind
    assert torch.equal(norm(x), plain)


def test_a_forward_pass_of_its_own_is_kept():
    norm, x = Permuting(8), torch.randn(4, 8, 3)
    make_owner_aware(norm, {"": OWNERS})
    torch.testing.assert_close(norm(x), nested_layer_norm(x.mT, Nesting(OWNERS), norm.weight, norm.bias).mT)


def test_calls_of_children_are_theirs():
    module, x = Calling(), torch.randn(4, 8)
    make_owner_aware(module, {"": OWNERS})
    torch.testing.assert_close(module(x), nested_layer_norm(x, Nesting(OWNERS)) + F.layer_norm(x, (8,)))
    assert not module.child._forward_hooks
    assert not module.child._forward_pre_hooks


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_the_fused_transformer_layer_is_not_used(masked):
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    x = torch.randn(3, 5, 8)
    mask = torch.arange(5) >= torch.tensor([[5], [3], [4]]) if masked else None
    plain = encoder(x, src_key_padding_mask=mask)
    make_owner_aware(encoder, {f"layers.{layer}.norm{norm}": OWNERS for layer in range(2) for norm in (1, 2)})
    aware = encoder(x, src_key_padding_mask=mask)
    with torch.enable_grad():  # never fused
        wanted = encoder(x, src_key_padding_mask=mask)
    shown = slice(None) if mask is None else ~mask
    torch.testing.assert_close(aware[shown], wanted[shown])
    make_owner_aware(encoder, {})
    assert torch.equal(encoder(x, src_key_padding_mask=mask), plain)
