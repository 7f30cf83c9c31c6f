"""Every operation of the tracer's table against brute force: each unit is changed, and what moves with it is seen."""

import warnings

import pytest
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_cf.exactness.check import check_exact
from lightning_cf.network.structure import NO_UNIT
from lightning_cf.network.tracing.operations import TABLE
from lightning_cf.network.tracing.trace import trace
from lightning_cf.ownership.ledger import NeuronLedger

pytestmark = pytest.mark.filterwarnings("ignore:index_reduce")  # a beta function of torch, which says so once a process

aten = torch.ops.aten


def packed_and_padded(x):
    """Sequences, the first of which is whole, as recurrent layers take them and give them back."""
    lengths = (x.shape[1] - torch.arange(len(x))).clamp_min(1)
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
    return nn.utils.rnn.pad_packed_sequence(packed, batch_first=True)[0]


class Net(nn.Module):
    """One unit an element, an operation on them, and outputs that read all that it gives."""

    def __init__(self, operation, shape, **layers):
        super().__init__()
        size = torch.Size(shape).numel()
        self.operation, self.shape = operation, shape
        self.hidden = nn.Linear(4, size)
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.extra = bool(layers)
        given = self.run(torch.randn(3, 4))
        self.head = nn.Linear(given.shape[1], 3)

    def run(self, x):
        x = self.hidden(x).reshape(-1, *self.shape)
        given = self.operation(self, x) if self.extra else self.operation(x)
        given = given if isinstance(given, torch.Tensor) else torch.cat([g.flatten(1) for g in given], dim=1)
        given = torch.view_as_real(given) if given.is_complex() else given
        return given.flatten(1).to(x.dtype)

    def forward(self, x):
        return self.head(self.run(x))


def moved(net, x):
    """Which outputs of the operation (columns) move with which element of the hidden layer (rows)."""
    with torch.no_grad():
        before, found = net.run(x), []
        for unit in range(net.hidden.out_features):
            seen = torch.zeros(before.shape[1], dtype=torch.bool)
            for draw in range(4):
                kept = net.hidden.weight[unit].clone(), net.hidden.bias[unit].clone()
                net.hidden.weight[unit] = torch.randn(4) * 10**draw
                net.hidden.bias[unit] = torch.randn(())
                seen |= ((net.run(x) != before) & ~(net.run(x).isnan() & before.isnan())).any(dim=0)
                net.hidden.weight[unit], net.hidden.bias[unit] = kept
            found.append(seen)
    return torch.stack(found)


def together(reach):
    """For each element the number of its connected component in the graph of what moves what."""
    units, outputs = reach.shape
    rows, columns = reach.nonzero(as_tuple=True)
    graph = coo_matrix((torch.ones(len(rows)).numpy(), (rows.numpy(), columns.numpy() + units)), (units + outputs,) * 2)
    return torch.from_numpy(connected_components(graph, directed=False)[1][:units])


def spread(x, by):
    """Values that no two elements share, so that comparisons have one outcome."""
    return x + by * torch.arange(x[0].numel()).reshape(x.shape[1:])


IMAGE, ROW, VOLUME, TOKENS = (3, 4, 4), (6,), (2, 2, 2, 2), (4, 3)
INDEX = torch.tensor([2, 0, 1])

# Operations on activations: what they move is exactly what shares a fate, but for the last ones.
EXACT = {
    "_to_copy": (ROW, lambda x: x.double()),
    "_unsafe_view": (TOKENS, lambda x: x.mT.reshape(len(x), -1) * 1),
    "aten._unsafe_view": (ROW, lambda x: aten._unsafe_view(x, [len(x), 2, 3])),
    "cat": (ROW, lambda x: torch.cat([x, x.flip(1)], dim=1)),
    "channel_shuffle": ((4, 2, 2), lambda x: aten.channel_shuffle(x, 2)),
    "native_channel_shuffle": ((4, 2, 2), lambda x: aten.native_channel_shuffle(x, 2)),
    "clone": (ROW, lambda x: x.clone()),
    "contiguous": (TOKENS, lambda x: x.mT.contiguous()),
    "constant_pad_nd": (IMAGE, lambda x: F.pad(x, (1, 1, 0, 2), value=3.0)),
    "copy_": (ROW, lambda x: torch.zeros(len(x), 8).index_fill(1, INDEX, 0)[:, :6].copy_(x)),
    "written in part": (ROW, lambda x: _written(x)),
    "diagonal_copy": ((3, 3), lambda x: torch.diagonal_copy(x, dim1=1, dim2=2)),
    "diag_embed": (ROW, lambda x: torch.diag_embed(x)),
    "flip": (ROW, lambda x: x.flip(1)),
    "gather": (ROW, lambda x: x.gather(1, INDEX.expand(len(x), -1))),
    "im2col": (IMAGE, lambda x: F.unfold(x, 2)),
    "index": (ROW, lambda x: x[:, INDEX]),
    "a mask": (ROW, lambda x: x[:, torch.tensor([True, False, True, True, False, True])]),
    "index_put": (ROW, lambda x: x.index_put((torch.arange(len(x)), torch.tensor(1)), x[:, 3])),
    "index_put_": (ROW, lambda x: _put(x)),
    "index_select": (ROW, lambda x: x.index_select(1, INDEX)),
    "masked_select": (ROW, lambda x: torch.masked_select(x, torch.ones_like(x) > 0).reshape(x.shape)),
    "pixel_shuffle": ((4, 2, 2), lambda x: F.pixel_shuffle(x, 2)),
    "pixel_unshuffle": ((2, 4, 4), lambda x: F.pixel_unshuffle(x, 2)),
    "reflection_pad1d": ((2, 4), lambda x: F.pad(x, (2, 1), mode="reflect")),
    "reflection_pad2d": (IMAGE, lambda x: F.pad(x, (2, 1, 1, 0), mode="reflect")),
    "reflection_pad3d": (VOLUME, lambda x: F.pad(x, (1, 1, 1, 1, 0, 1), mode="reflect")),
    "replication_pad1d": ((2, 4), lambda x: F.pad(x, (2, 1), mode="replicate")),
    "replication_pad2d": (IMAGE, lambda x: F.pad(x, (2, 1, 1, 0), mode="replicate")),
    "replication_pad3d": (VOLUME, lambda x: F.pad(x, (1, 1, 1, 1, 0, 1), mode="replicate")),
    "circular padding": (IMAGE, lambda x: F.pad(x, (1, 1, 1, 1), mode="circular")),
    "repeat": (ROW, lambda x: x.repeat(1, 2)),
    "roll": (ROW, lambda x: x.roll(2, 1)),
    "rot90": (IMAGE, lambda x: x.rot90(1, (2, 3))),
    "slice_scatter": (ROW, lambda x: torch.slice_scatter(x, x[:, :2], 1, 3, 5)),
    "select_scatter": (ROW, lambda x: torch.select_scatter(x, x[:, 0], 1, 5)),
    "stack": (ROW, lambda x: torch.stack([x, x.roll(1, 1)], dim=1)),
    "take": (ROW, lambda x: torch.take(x, torch.arange(x.numel()).reshape(x.shape).flip(1))),
    "tril": ((3, 3), lambda x: x.tril()),
    "triu": ((3, 3), lambda x: x.triu()),
    "_pack_padded_sequence": (TOKENS, packed_and_padded),
    "unfold_copy": (ROW, lambda x: torch.unfold_copy(x, 1, 3, 1)),
    "unfold": (ROW, lambda x: x.unfold(1, 3, 2)),
    "unsafe_chunk": (ROW, lambda x: torch.unsafe_chunk(x, 2, 1)),
    "unsafe_split": (ROW, lambda x: torch.unsafe_split(x, 2, 1)),
    "unsafe_split_with_sizes": (ROW, lambda x: torch.unsafe_split_with_sizes(x, [2, 4], 1)),
    "upsample_nearest1d": ((2, 3), lambda x: F.interpolate(x, scale_factor=2)),
    "views of views": (IMAGE, lambda x: x.transpose(1, 3)[:, 1:, :, 0].unsqueeze(1).expand(-1, 2, -1, -1)),
    "channels last": (IMAGE, lambda x: x.contiguous(memory_format=torch.channels_last).flatten(1).tanh()),
    "lift_fresh": (ROW, lambda x: aten.lift_fresh(x)),
    "lift_fresh_copy": (ROW, lambda x: aten.lift_fresh_copy(x)),
    "data": (ROW, lambda x: x.sin().data.roll(1, 1)),
    # elementwise
    "activations": (ROW, lambda x: F.gelu(x.relu_()) + F.silu(x).sigmoid_() + F.softplus(x)),
    "_prelu_kernel": (ROW, lambda x: aten._prelu_kernel(x, torch.full((6,), 0.3))),
    "abs_": (ROW, lambda x: (x * 1).abs_()),
    "bernoulli": (ROW, lambda x: _seeded(lambda: torch.bernoulli(x.sigmoid())) + x),
    "complex": (ROW, lambda x: torch.complex(x, x.flip(1))),
    "polar": (ROW, lambda x: torch.polar(x.abs(), x)),
    "view_as_real": (ROW, lambda x: torch.view_as_real(torch.complex(x, x))),
    "view_as_complex": ((3, 2), lambda x: torch.view_as_complex(x.contiguous())),
    "fake_quantize_per_tensor_affine": (ROW, lambda x: torch.fake_quantize_per_tensor_affine(x, 0.01, 0, -128, 127)),
    "glu": (ROW, lambda x: F.glu(x)),
    "hardsigmoid": (ROW, lambda x: F.hardsigmoid(x)),
    "hardsigmoid_": (ROW, lambda x: F.hardsigmoid(x * 1, inplace=True)),
    "hardswish": (ROW, lambda x: F.hardswish(x)),
    "hardswish_": (ROW, lambda x: F.hardswish(x * 1, inplace=True)),
    "hardtanh_": (ROW, lambda x: F.hardtanh(x * 1, inplace=True)),
    "log_sigmoid_forward": (ROW, lambda x: F.logsigmoid(x)),
    "masked_fill": (ROW, lambda x: x.masked_fill(x.roll(1, 1) > 0, 0.0)),
    "masked_fill_": (ROW, lambda x: (x * 1).masked_fill_(x.roll(1, 1) > 0, 0.0)),
    "mish_": (ROW, lambda x: F.mish(x * 1, inplace=True)),
    "rrelu_with_noise": (ROW, lambda x: F.rrelu(x)),
    "rrelu_with_noise_": (ROW, lambda x: F.rrelu(x * 1, inplace=True)),
    "where": (ROW, lambda x: torch.where(x > 0, x.flip(1), 0.0)),
    "maximum": (ROW, lambda x: torch.maximum(x[:, :3], x[:, 3:])),
    "max.other": (ROW, lambda x: torch.max(x[:, :3], x[:, 3:])),
    "dropout": (ROW, lambda x: _seeded(lambda: F.dropout(x, 0.5, True))),
    # along dims
    "_fft_c2c": (ROW, lambda x: torch.fft.fft(torch.complex(x, x))),
    "_fft_c2r": ((2, 4), lambda x: torch.fft.irfft(torch.complex(x, x.flip(2)), dim=2)),
    "_fft_r2c": ((2, 4), lambda x: torch.fft.rfft(x, dim=2)),
    "_log_softmax": ((2, 3), lambda x: x.log_softmax(2)),
    "_safe_softmax": ((2, 3), lambda x: aten._safe_softmax(x, 2)),
    "_softmax": ((2, 3), lambda x: x.softmax(1) * 2),
    "all": ((2, 3), lambda x: (x > 0).all(2)),
    "amax": ((2, 3), lambda x: x.amax(2)),
    "amin": ((2, 3), lambda x: x.amin(2)),
    "aminmax": ((2, 3), lambda x: torch.aminmax(x, dim=2)),
    "any": ((2, 3), lambda x: (x > 0).any(2)),
    "argmax": ((2, 3), lambda x: x.argmax(2)),
    "argmin": ((2, 3), lambda x: x.argmin(2)),
    "argsort": ((2, 3), lambda x: x.argsort(2)),
    "count_nonzero": ((2, 3), lambda x: (x > 0).count_nonzero(2)),
    "cummax": ((2, 3), lambda x: x.cummax(2).values),
    "cummin": ((2, 3), lambda x: x.cummin(2).values),
    "cumprod": ((2, 3), lambda x: x.cumprod(2)),
    "cumsum": ((2, 3), lambda x: x.cumsum(2)),
    "kthvalue": ((2, 3), lambda x: x.kthvalue(2, 2).values),
    "linalg_vector_norm": ((2, 3), lambda x: torch.linalg.vector_norm(x, dim=2)),
    "logcumsumexp": ((2, 3), lambda x: x.logcumsumexp(2)),
    "logsumexp": ((2, 3), lambda x: x.logsumexp(2)),
    "max": ((2, 3), lambda x: x.max(2)),
    "mean": ((2, 3), lambda x: x.mean(1)),
    "median": ((2, 3), lambda x: x.median(2).values),
    "min": ((2, 3), lambda x: x.min(2)),
    "mode": ((2, 3), lambda x: x.round().mode(2).values),
    "nanmean": ((2, 3), lambda x: x.nanmean(2)),
    "nansum": ((2, 3), lambda x: x.nansum(2)),
    "norm": ((2, 3), lambda x: aten.norm(x, 2, [2])),
    "prod": ((2, 3), lambda x: x.prod(2)),
    "sort": ((2, 3), lambda x: x.sort(2)),
    "std": ((2, 3), lambda x: x.std(2)),
    "std_mean": ((2, 3), lambda x: torch.std_mean(x, 2)),
    "sum": ((2, 3), lambda x: x.sum(2, keepdim=True)),
    "topk": ((2, 3), lambda x: x.topk(2, 2)),
    "var": ((2, 3), lambda x: x.var(2)),
    "var_mean": ((2, 3), lambda x: torch.var_mean(x, 2)),
    # windows of positions
    "_adaptive_avg_pool2d": (IMAGE, lambda x: F.adaptive_avg_pool2d(x, (1, 1)) + F.adaptive_avg_pool2d(x, 3).sum()),
    "_adaptive_avg_pool3d": (VOLUME, lambda x: aten._adaptive_avg_pool3d(x, [1, 1, 1])),
    "adaptive_avg_pool1d": ((2, 4), lambda x: F.adaptive_avg_pool1d(x, 3)),
    "adaptive_max_pool2d": (IMAGE, lambda x: F.adaptive_max_pool2d(x, 1)),
    "adaptive_max_pool3d": (VOLUME, lambda x: F.adaptive_max_pool3d(x, 1)),
    "avg_pool1d": ((2, 4), lambda x: F.avg_pool1d(x, 3, 1)),
    "avg_pool2d": (IMAGE, lambda x: F.avg_pool2d(x, 3, 1)),
    "avg_pool3d": (VOLUME, lambda x: F.avg_pool3d(x, 2)),
    "col2im": ((4, 3), lambda x: F.fold(x, (1, 4), (1, 2))),
    "fractional_max_pool2d": (IMAGE, lambda x: _seeded(lambda: F.fractional_max_pool2d(x, 2, 3))),
    "fractional_max_pool3d": ((1, 4, 4, 4), lambda x: _seeded(lambda: F.fractional_max_pool3d(x, 2, 2))),
    "grid_sampler_2d": (IMAGE, lambda x: F.grid_sample(x, _grid(x, 2), align_corners=False)),
    "grid_sampler_3d": (VOLUME, lambda x: F.grid_sample(x, _grid(x, 3), align_corners=False)),
    "index_add": (TOKENS, lambda x: x.index_add(1, torch.tensor([0, 0]), x[:, 2:])),
    "index_add_": (TOKENS, lambda x: (x * 1).index_add_(2, torch.tensor([1]), x[:, :, 2:])),
    "index_reduce": (TOKENS, lambda x: x.index_reduce(1, torch.tensor([3, 0]), x[:, 1:3], "mean")),
    "index_reduce_": (TOKENS, lambda x: (x * 1).index_reduce_(1, torch.tensor([0]), x[:, 3:], "mean")),
    "scatter_add": (TOKENS, lambda x: x.scatter_add(1, torch.tensor([[0, 1, 3]]).expand(len(x), 2, 3), x)),
    "scatter_add_": (
        ROW,
        lambda x: (x[:, :3] * 1).scatter_add_(1, torch.tensor([[0, 0, 2]]).expand(len(x), 3), x[:, 3:]),
    ),
    "scatter_reduce": (ROW, lambda x: x.scatter_reduce(1, torch.tensor([[5, 4]]).expand(len(x), 2), x[:, 1:3], "mean")),
    "scatter_reduce_": (ROW, lambda x: (x * 1).scatter_reduce_(1, torch.tensor([[5]]).expand(len(x), 1), x, "mean")),
    "messages": ((5,), lambda x: x.new_zeros(2, 5).index_add(0, torch.arange(len(x)) % 2, x)),
    "max_pool2d_with_indices": (IMAGE, lambda x: F.max_pool2d(x, 3, 1)),
    "max_pool3d_with_indices": (VOLUME, lambda x: F.max_pool3d(x, 2)),
    "max_unpool2d": (IMAGE, lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2)),
    "max_unpool3d": (VOLUME, lambda x: F.max_unpool3d(*F.max_pool3d(x, 2, return_indices=True), 2)),
    "upsample_bicubic2d": (IMAGE, lambda x: F.interpolate(x, size=7, mode="bicubic")),
    "upsample_bilinear2d": (IMAGE, lambda x: F.interpolate(x, size=7, mode="bilinear")),
    "upsample_linear1d": ((2, 4), lambda x: F.interpolate(x, size=7, mode="linear")),
    "upsample_nearest2d": (IMAGE, lambda x: F.interpolate(x, scale_factor=2)),
    "upsample_nearest3d": (VOLUME, lambda x: F.interpolate(x, scale_factor=2)),
    "upsample_trilinear3d": (VOLUME, lambda x: F.interpolate(x, size=3, mode="trilinear")),
    "_upsample_nearest_exact1d": ((2, 4), lambda x: F.interpolate(x, size=7, mode="nearest-exact")),
    "_upsample_nearest_exact2d": (IMAGE, lambda x: F.interpolate(x, size=7, mode="nearest-exact")),
    "_upsample_nearest_exact3d": (VOLUME, lambda x: F.interpolate(x, size=3, mode="nearest-exact")),
    "_upsample_bicubic2d_aa": (IMAGE, lambda x: F.interpolate(x, size=2, mode="bicubic", antialias=True)),
    "_upsample_bilinear2d_aa": (IMAGE, lambda x: F.interpolate(x, size=2, mode="bilinear", antialias=True)),
    # products of activations and with what is fixed
    "bmm": ((2, 2, 3), lambda x: x[:, 0] @ x[:, 1].mT),
    "baddbmm": ((2, 2, 2), lambda x: torch.baddbmm(x[:, 0], x[:, 0], x[:, 1])),
    "_sparse_addmm": ((5,), lambda x: torch.sparse.mm(torch.ones(2, len(x)).to_sparse(), x)),
    "attention": ((2, 3, 2), lambda x: F.scaled_dot_product_attention(x, x, x)),
    "mm": (ROW, lambda x: x @ torch.ones(6, 2)),
    "addmm": (ROW, lambda x: torch.addmm(torch.ones(2), x, torch.ones(6, 2))),
    "mv": (ROW, lambda x: (x @ torch.ones(6))[:, None]),
    "convolution": (IMAGE, lambda x: F.conv2d(x, torch.ones(3, 1, 4, 4), groups=3)),
    "einsum": ((2, 2, 3), lambda x: torch.einsum("bhd,bhd->bh", x[:, 0], x[:, 1])),
    # what depends on shapes or on chance alone
    "creation": (ROW, lambda x: x + _created(x)),
    "fills": (ROW, lambda x: x + _filled(x)),
}

COARSE = {
    "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d",
    "_upsample_nearest_exact3d", "fractional_max_pool2d", "fractional_max_pool3d", "max_unpool2d",  # windows: channels
    "_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa", "col2im", "adaptive_avg_pool1d", "max_unpool3d",
    "mode", "kthvalue", "median", "grid_sampler_2d", "grid_sampler_3d",  # what moves depends on the values
    "masked_select",  # its shape depends on values, as far as anyone knows
    "complex", "view_as_complex",  # a number's two parts
    "_to_copy", "fake_quantize_per_tensor_affine", "bernoulli", "all", "any",  # few values: not all changes are seen
    "count_nonzero", "argmax", "argmin",
}  # fmt: skip
"""Where units share a fate though no change shows it: soundness alone is checked."""


def _written(x):
    both = torch.zeros(len(x), 4, 2)
    both[:, :3, 0] = x[:, :3]
    both[:, 1:].select(2, 1).copy_(x[:, 3:])
    return both


def _put(x):
    x = x * 1
    x[:, torch.tensor([0, 1])] = x[:, 2:4]
    return x


def _seeded(draw):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return draw()


def _grid(x, dims):
    grid = torch.linspace(-0.9, 0.9, 3)
    places = torch.stack(torch.meshgrid(*[grid] * dims, indexing="ij"), dim=-1)
    return places.expand(len(x), *places.shape)


def _created(x):
    made = [torch.zeros_like(x), torch.ones_like(x), torch.full_like(x, 2.0), x.new_zeros(x.shape), x.new_ones(x.shape)]
    made += [x.new_full(x.shape, 3.0), torch.zeros(6), torch.ones(6), torch.full((6,), 1.0), torch.arange(6.0)]
    made += [torch.linspace(0, 1, 6), torch.eye(6)[0], torch.scalar_tensor(2.0)]
    shapes = [torch.empty(6), torch.empty_like(x), x.new_empty(x.shape), torch.empty_strided((6,), (1,))]
    shapes += [x.new_empty_strided((6,), (1,)), torch.empty_permuted((6,), (0,))]
    noise = _seeded(
        lambda: [
            *(torch.rand(6), torch.rand_like(x), torch.randn(6), torch.randn_like(x), torch.randint(9, (6,))),
            *(torch.randint_like(x, 9), torch.randperm(6)),
        ]
    )
    return sum(made) + sum(noise) + sum(0 * shape.nan_to_num(0, 0, 0).isnan() for shape in shapes)


def _filled(x):
    return _seeded(
        lambda: sum(
            [
                *((x * 1).zero_(), (x * 1).fill_(2.0), (x * 1).normal_(), (x * 1).uniform_(), (x * 1).bernoulli_(0.5)),
                *((x * 1).exponential_(), (x * 1).random_(9)),
            ]
        )
    )


@pytest.mark.parametrize("name", EXACT)
def test_what_moves_shares_a_fate_and_nothing_else_does(name):
    torch.manual_seed(1)
    shape, operation = EXACT[name]
    net, x = Net(operation, shape).eval(), torch.randn(3, 4)
    structure = trace(net, x)
    units = structure.entries["hidden.weight"][0].target.expand(-1, 1).flatten()
    units = units.expand(net.hidden.out_features)
    outputs = structure.entries["head.weight"][0].source.expand(1, net.head.in_features).flatten()
    reach = moved(net, x)
    row, column = reach.nonzero(as_tuple=True)
    assert torch.equal(outputs[column], units[row])  # soundness
    if name not in COARSE:
        groups = together(reach)
        same = units[:, None] == units[None, :]
        assert torch.equal(same, groups[:, None] == groups[None, :])  # tightness


# Operations with weights: new units, or what a norm takes together; a random claim must not leak.
WEIGHTED = {
    "mm": (ROW, lambda net, x: x @ net.w, {"w": nn.Parameter(torch.randn(6, 5))}),
    "mm, weight first": ((6, 1), lambda net, x: net.w @ x, {"w": nn.Parameter(torch.randn(5, 6))}),
    "addmm": (ROW, lambda net, x: net.layer(x), {"layer": nn.Linear(6, 5)}),
    "bmm": (
        (2, 3),
        lambda net, x: torch.bmm(x.transpose(0, 1), net.w).transpose(0, 1),
        {"w": nn.Parameter(torch.randn(2, 3, 4))},
    ),
    "baddbmm": (
        (2, 3),
        lambda net, x: torch.baddbmm(net.b, x.transpose(0, 1), net.w).transpose(0, 1),
        {"w": nn.Parameter(torch.randn(2, 3, 4)), "b": nn.Parameter(torch.randn(2, 1, 4))},
    ),
    "bmm, one weight for all": (
        (2, 3),
        lambda net, x: x @ net.w.expand(len(x), -1, -1),
        {"w": nn.Parameter(torch.randn(3, 4))},
    ),
    "einsum": (TOKENS, lambda net, x: torch.einsum("btd,de->bte", x, net.w), {"w": nn.Parameter(torch.randn(3, 5))}),
    "positions": (
        (4, 5),
        lambda net, x: net.layer(x.amax(2, keepdim=True).expand(-1, -1, 5)),
        {"layer": nn.Linear(5, 6)},
    ),
    "mv": (ROW, lambda net, x: (x @ net.w)[:, None], {"w": nn.Parameter(torch.randn(6))}),
    "dot": (
        ROW,
        lambda net, x: torch.stack([torch.dot(row, net.w) for row in x])[:, None],
        {"w": nn.Parameter(torch.randn(6))},
    ),
    "convolution": (IMAGE, lambda net, x: net.layer(x), {"layer": nn.Conv2d(3, 5, 3, padding="same")}),
    "grouped": ((4, 3, 3), lambda net, x: net.layer(x), {"layer": nn.Conv2d(4, 6, 2, groups=2, dilation=2)}),
    "transposed": (IMAGE, lambda net, x: net.layer(x), {"layer": nn.ConvTranspose2d(3, 5, 2, 2, output_padding=1)}),
    "transposed, grouped": ((4, 2, 2), lambda net, x: net.layer(x), {"layer": nn.ConvTranspose2d(4, 6, 2, groups=2)}),
    "computed kernel": (
        (2, 3, 3),
        lambda net, x: F.conv2d(x, net.layer(x.mean((0, 2, 3))).reshape(4, 2, 1, 1)),
        {"layer": nn.Linear(2, 8)},
    ),
    "embedding": (ROW, lambda net, x: x + net.layer(torch.arange(6) % 5).sum(1), {"layer": nn.Embedding(5, 3)}),
    "_embedding_bag": (
        ROW,
        lambda net, x: torch.cat([x, net.layer(torch.tensor([[1, 2]] * len(x)))], dim=1),
        {"layer": nn.EmbeddingBag(5, 3)},
    ),
    "an index that units decide": (
        ROW,
        lambda net, x: net.layer((x.abs() * 3).long().clamp(max=4)),
        {"layer": nn.Embedding(5, 3)},
    ),
    "_trilinear": (ROW, lambda net, x: net.layer(x, x[:, :2].detach()), {"layer": nn.Bilinear(6, 2, 4)}),
    "_native_batch_norm_legit": ((3, 4), lambda net, x: net.layer(x), {"layer": nn.InstanceNorm1d(3, affine=True)}),
    "native_batch_norm": (IMAGE, lambda net, x: net.layer(x), {"layer": nn.BatchNorm2d(3)}),
    "batch statistics": (IMAGE, lambda net, x: net.layer(x), {"layer": nn.BatchNorm2d(3, track_running_stats=False)}),
    "instance statistics": (
        IMAGE,
        lambda net, x: net.layer(x),
        {"layer": nn.InstanceNorm2d(3, affine=True, track_running_stats=True)},
    ),
    "native_layer_norm": (TOKENS, lambda net, x: net.layer(x), {"layer": nn.LayerNorm(3)}),
    "a norm of two axes": (TOKENS, lambda net, x: net.layer(x), {"layer": nn.LayerNorm((4, 3))}),
    "native_group_norm": ((4, 3), lambda net, x: net.layer(x), {"layer": nn.GroupNorm(2, 4)}),
    "rms_norm": (TOKENS, lambda net, x: net.layer(x), {"layer": nn.RMSNorm(3)}),
    "_weight_norm_interface": (
        ROW,
        lambda net, x: net.layer(x),
        {"layer": parametrizations.weight_norm(nn.Linear(6, 5))},
    ),
    "weight_norm of columns": (
        ROW,
        lambda net, x: net.layer(x),
        {"layer": parametrizations.weight_norm(nn.Linear(6, 5), dim=1)},
    ),
    "spectral_norm": (ROW, lambda net, x: net.layer(x), {"layer": parametrizations.spectral_norm(nn.Linear(6, 5))}),
    "masked weight": (
        ROW,
        lambda net, x: F.linear(x, net.w * net.mask),
        {"w": nn.Parameter(torch.randn(5, 6)), "mask": nn.Buffer((torch.rand(5, 6) > 0.5).float())},
    ),
    "low-rank change of a weight": (
        ROW,
        lambda net, x: F.linear(x, net.w + net.b @ net.a),
        {name: nn.Parameter(torch.randn(shape)) for name, shape in {"w": (5, 6), "b": (5, 2), "a": (2, 6)}.items()},
    ),
    "joined weights": (
        ROW,
        lambda net, x: F.linear(x, torch.cat([net.a, net.b])),
        {name: nn.Parameter(torch.randn(shape)) for name, shape in {"a": (2, 6), "b": (3, 6)}.items()},
    ),
    "a weight in slices": (
        ROW,
        lambda net, x: torch.cat([x @ part for part in net.w.split([1, 4], dim=1)], dim=1),
        {"w": nn.Parameter(torch.randn(6, 5))},
    ),
    "a repeated weight": (ROW, lambda net, x: F.linear(x, net.w.repeat(2, 2)), {"w": nn.Parameter(torch.randn(2, 3))}),
    "positive weights": (ROW, lambda net, x: x * F.softplus(net.w), {"w": nn.Parameter(torch.randn(6))}),
    "temperature": (ROW, lambda net, x: x * net.w.exp(), {"w": nn.Parameter(torch.randn(()))}),
    "scatter": (
        ROW,
        lambda net, x: net.layer(torch.zeros_like(x).scatter_add(1, x.long() % 6, x)),
        {"layer": nn.Linear(6, 5)},
    ),
    "cdist": ((2, 3), lambda net, x: net.layer(torch.cdist(x, x)), {"layer": nn.Linear(2, 5)}),
    "attention": (
        (4, 6),
        lambda net, x: net.layer(x, x, x, need_weights=False)[0],
        {"layer": nn.MultiheadAttention(6, 2, batch_first=True)},
    ),
    "causal attention, fewer keys than queries": (
        (4, 3, 2),
        lambda net, x: F.scaled_dot_product_attention(x, x[:, :2], x[:, :2], is_causal=True, enable_gqa=True) + net.w,
        {"w": nn.Parameter(torch.randn(2))},
    ),
    "cells": (ROW, lambda net, x: net.layer(x, torch.zeros(len(x), 4)), {"layer": nn.GRUCell(6, 4)}),
    "assertion": (ROW, lambda net, x: _asserted(net.layer(x)), {"layer": nn.Linear(6, 5)}),
}


def _asserted(x):
    torch._assert_async(x.isfinite().all())
    return x


def checked(net, x):
    structure = trace(net, x)
    ledger = NeuronLedger.for_structure(structure)
    ledger.whole = [group.name for group in structure.groups if group.size == 1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_exact(net, structure, ledger, x)
    return structure


@pytest.mark.parametrize("name", WEIGHTED)
def test_claims_do_not_leak_through_operations_with_weights(name):
    torch.manual_seed(1)
    shape, operation, layers = WEIGHTED[name]
    net, x = Net(operation, shape, **layers).eval(), torch.randn(4, 4)
    structure = checked(net, x)
    known = set(structure.entries)
    assert {name for name, _ in net.named_parameters()} <= known
    if structure.norms:
        return
    with torch.no_grad():  # an entry that belongs to a unit moves what reads that unit, and nothing else
        before = net.run(x)
        sources = structure.entries["head.weight"][0].source.expand(1, net.head.in_features).flatten()
        for tensor, uses in structure.entries.items():
            parameter = dict(net.named_parameters()).get(tensor)
            if parameter is None or tensor.startswith(("head", "hidden")) or len(uses) > 1:
                continue
            targets = uses[0].target.expand(parameter.shape).flatten()
            for entry, target in enumerate(targets.tolist()):
                if target != NO_UNIT and target not in sources:
                    continue  # read by another layer first
                kept = parameter.flatten()[entry].clone()
                parameter.view(-1)[entry] += 1.0
                moving = (net.run(x) != before).any(dim=0)
                parameter.view(-1)[entry] = kept
                assert target == NO_UNIT or bool((sources[moving] == target).all()), (tensor, entry)


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operations = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations.add(func.overloadpacket)
        return func(*args, **(kwargs or {}))


EXEMPT = {
    "cudnn_batch_norm": "runs on a GPU alone",
    "_native_batch_norm_legit_no_training": "what native_batch_norm becomes in an export",
    "_native_batch_norm_legit": "what native_batch_norm becomes in an export",
    "_local_scalar_dense": "tests/exactness/test_check.py",
    "equal": "as _local_scalar_dense",
    "is_nonzero": "as _local_scalar_dense",
    "_assert_tensor_metadata": "changes nothing",
    "sym_size": "never reaches a dispatch mode with plain tensors",
    "contiguous": "seen as clone",
    "addbmm": "has the rule of unknown operations",
    "_embedding_bag_forward_only": "_embedding_bag of weights that need no gradient",
    "vdot": "of two vectors of parameters: spectral_norm",
}


@torch.no_grad()
def test_no_operation_is_without_a_case():
    cases = [Net(operation, shape) for shape, operation in EXACT.values()]
    cases += [Net(operation, shape, **layers) for shape, operation, layers in WEIGHTED.values()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.backends.mkldnn.flags(enabled=False), Seen() as seen:
            for net in cases:
                net.eval()(torch.randn(3, 4))
    missing = {operation._qualified_op_name.removeprefix("aten::") for operation in TABLE.keys() - seen.operations}
    assert missing <= EXEMPT.keys()
