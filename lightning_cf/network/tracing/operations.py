"""What each tensor operation does to units: the tracer's table, one line an operation.

Operations that PyTorch tags as pointwise, and views, need no line. What has no line unites the units that it meets.
"""

from __future__ import annotations

from typing import Any

import torch

from lightning_cf.network.tracing.rules.call import Rule
from lightning_cf.network.tracing.rules.contractions import bilinear, contract, convolution, embedding
from lightning_cf.network.tracing.rules.elementwise import as_complex, as_real, constant, fill, glu, pointwise, state
from lightning_cf.network.tracing.rules.mixtures import along, col2im, sample, scatter, unpool, weight_norm, windows
from lightning_cf.network.tracing.rules.movements import move, pack
from lightning_cf.network.tracing.rules.norms import batch_norm, group_norm, layer_norm
from lightning_cf.network.tracing.rules.unknown import read, unite

aten = torch.ops.aten

TABLE: dict[Any, Rule] = {
    # movements
    aten._pack_padded_sequence: pack,
    aten._to_copy: move(),
    aten._unsafe_view: move(),
    aten.cat: move(),
    aten.channel_shuffle: move(),
    aten.clone: move(),
    aten.constant_pad_nd: move(),
    aten.contiguous: move(),
    aten.copy_: move(),
    aten.diag_embed: move(),
    aten.diagonal_copy: move(),
    aten.flip: move(),
    aten.gather: move(index="index"),
    aten.im2col: move(),
    aten.index: move(index="indices"),
    aten.index_put: move(index="indices"),
    aten.index_put_: move(index="indices"),
    aten.index_select: move(index="index"),
    aten.lift_fresh: move(),
    aten.lift_fresh_copy: move(),
    aten.masked_select: move(index="mask"),
    aten.native_channel_shuffle: move(),
    aten.pixel_shuffle: move(),
    aten.pixel_unshuffle: move(),
    aten.reflection_pad1d: move(),
    aten.reflection_pad2d: move(),
    aten.reflection_pad3d: move(),
    aten.repeat: move(),
    aten.replication_pad1d: move(),
    aten.replication_pad2d: move(),
    aten.replication_pad3d: move(),
    aten.roll: move(),
    aten.rot90: move(),
    aten.slice_scatter: move(),
    aten.select_scatter: move(),
    aten.stack: move(),
    aten.take: move(index="index"),
    aten.tril: move(),
    aten.triu: move(),
    aten.unfold_copy: move(),
    aten.unsafe_split: move(),
    aten.unsafe_split_with_sizes: move(),
    aten.upsample_nearest1d: move(),
    # elementwise, beside those that PyTorch tags
    aten._prelu_kernel: pointwise,
    aten.abs_: pointwise,
    aten.bernoulli: pointwise,
    aten.complex: pointwise,
    aten.view_as_complex: as_complex,
    aten.view_as_real: as_real,
    aten.fake_quantize_per_tensor_affine_cachemask: pointwise,
    aten.glu: glu,
    aten.hardsigmoid: pointwise,
    aten.hardsigmoid_: pointwise,
    aten.hardswish: pointwise,
    aten.hardswish_: pointwise,
    aten.hardtanh_: pointwise,
    aten.masked_fill: pointwise,
    aten.log_sigmoid_forward: pointwise,
    aten.masked_fill_: pointwise,
    aten.mish_: pointwise,
    aten.polar: pointwise,
    aten.rrelu_with_noise: pointwise,
    aten.rrelu_with_noise_: pointwise,
    # what depends on shapes or on chance alone
    aten.arange: constant,
    aten.bernoulli_: fill,
    aten.empty: constant,
    aten.empty_like: constant,
    aten.empty_permuted: constant,
    aten.empty_strided: constant,
    aten.exponential_: fill,
    aten.eye: constant,
    aten.fill_: fill,
    aten.full: constant,
    aten.full_like: constant,
    aten.linspace: constant,
    aten.new_empty: constant,
    aten.new_empty_strided: constant,
    aten.new_full: constant,
    aten.new_ones: constant,
    aten.new_zeros: constant,
    aten.normal_: fill,
    aten.ones: constant,
    aten.ones_like: constant,
    aten.rand: constant,
    aten.rand_like: constant,
    aten.randint: constant,
    aten.randint_like: constant,
    aten.randn: constant,
    aten.randn_like: constant,
    aten.random_: fill,
    aten.randperm: constant,
    aten.scalar_tensor: constant,
    aten.uniform_: fill,
    aten.zero_: fill,
    aten.zeros: constant,
    aten.zeros_like: constant,
    # along dims
    aten._fft_c2c: along(),
    aten._fft_c2r: along(),
    aten._fft_r2c: along(),
    aten._log_softmax: along(keeps=True),
    aten._safe_softmax: along(keeps=True),
    aten._softmax: along(keeps=True),
    aten.all: along(),
    aten.amax: along(),
    aten.amin: along(),
    aten.aminmax: along(),
    aten.any: along(),
    aten.argmax: along(),
    aten.argmin: along(),
    aten.count_nonzero: along(),
    aten.cummax: along(),
    aten.cummin: along(),
    aten.cumprod: along(),
    aten.cumsum: along(),
    aten.kthvalue: along(),
    aten.linalg_vector_norm: along(),
    aten.logcumsumexp: along(),
    aten.logsumexp: along(),
    aten.max: along(),
    aten.mean: along(),
    aten.median: along(),
    aten.min: along(),
    aten.mode: along(),
    aten.nansum: along(),
    aten.norm: along(),
    aten.prod: along(),
    aten.sort: along(),
    aten.std: along(),
    aten.std_mean: along(),
    aten.sum: along(),
    aten.topk: along(),
    aten.var: along(),
    aten.var_mean: along(),
    # windows of positions
    aten._adaptive_avg_pool2d: windows(2),
    aten._adaptive_avg_pool3d: windows(3),
    aten._upsample_bicubic2d_aa: windows(2),
    aten._upsample_bilinear2d_aa: windows(2),
    aten._upsample_nearest_exact1d: windows(1),
    aten._upsample_nearest_exact2d: windows(2),
    aten._upsample_nearest_exact3d: windows(3),
    aten.adaptive_max_pool2d: windows(2),
    aten.adaptive_max_pool3d: windows(3),
    aten.avg_pool2d: windows(2),
    aten.avg_pool3d: windows(3),
    aten.col2im: col2im,
    aten.fractional_max_pool2d: windows(2),
    aten.fractional_max_pool3d: windows(3),
    aten.grid_sampler_2d: sample,
    aten.grid_sampler_3d: sample,
    aten.index_add: scatter,
    aten.index_add_: scatter,
    aten.index_reduce: scatter,
    aten.index_reduce_: scatter,
    aten.max_pool2d_with_indices: windows(2),
    aten.max_pool3d_with_indices: windows(3),
    aten.max_unpool2d: unpool(2),
    aten.max_unpool3d: unpool(3),
    aten.scatter_add: scatter,
    aten.scatter_add_: scatter,
    aten.scatter_reduce: scatter,
    aten.scatter_reduce_: scatter,
    aten.upsample_bicubic2d: windows(2),
    aten.upsample_bilinear2d: windows(2),
    aten.upsample_linear1d: windows(1),
    aten.upsample_nearest2d: windows(2),
    aten.upsample_nearest3d: windows(3),
    aten.upsample_trilinear3d: windows(3),
    # contractions
    aten._sparse_addmm: contract("mat1", "mat2", "self"),
    aten._trilinear: bilinear,
    aten.addbmm: unite,
    aten.addmm: contract("mat1", "mat2", "self"),
    aten.baddbmm: contract("batch1", "batch2", "self"),
    aten.bmm: contract("self", "mat2"),
    aten.convolution: convolution,
    aten.dot: contract("self", "tensor"),
    aten._embedding_bag: embedding,
    aten._embedding_bag_forward_only: embedding,
    aten.embedding: embedding,
    aten.mm: contract("self", "mat2"),
    aten.mv: contract("self", "vec"),
    aten.vdot: contract("self", "other"),
    # normalisations
    aten._native_batch_norm_legit: batch_norm,
    aten._native_batch_norm_legit_no_training: batch_norm,
    aten._weight_norm_interface: weight_norm,
    aten.cudnn_batch_norm: batch_norm,
    aten.native_batch_norm: batch_norm,
    aten.native_group_norm: group_norm,
    aten.native_layer_norm: layer_norm,
    # what leaves the tensors
    aten._assert_async: state,
    aten._assert_tensor_metadata: state,
    aten._local_scalar_dense: read,
    aten.equal: read,
    aten.is_nonzero: read,
    aten.sym_size: state,
}


def rule_of(func: Any) -> tuple[Rule, bool]:
    """The rule of an operator, and whether it treats each element on its own, wherever it goes."""
    operation = func.overloadpacket
    if func in _BINARY:
        return pointwise, False
    if operation in TABLE:
        rule = TABLE[operation]
        return rule, rule is pointwise or operation in _TRANSPARENT
    if func.is_view or torch.Tag.inplace_view in func.tags:
        return move(), True
    if torch.Tag.pointwise in func.tags:
        return pointwise, True
    return unite, False


def is_movement(func: Any) -> bool:
    """Whether an operator puts elements in other places and changes none."""
    return rule_of(func)[0].__module__ == move.__module__


_BINARY = {aten.max.other, aten.min.other}
_TRANSPARENT = {aten._to_copy, aten._unsafe_view, aten.clone, aten.flip, aten.roll}
