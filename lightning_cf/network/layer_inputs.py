"""What linear layers and convolutions read, seen where their functions are called, whatever layer calls them."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_cf.utilities.randomness import keyed_generator

Features = Float[Tensor, "samples features"]
Inputs = Float[Tensor, "rows units"]
Record = Callable[[str, Inputs, Features], None]

_CONVOLUTIONS: dict[Any, int] = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}


class InputRecorder(TorchFunctionMode):
    """Calls ``record(name, x, patches)`` for the input of every linear or ungrouped convolution with a known weight.

    The projections of ``nn.MultiheadAttention`` count, where query, key and value are one tensor.

    ``x`` holds one row a sample (batch entry, token or position) and one column an input unit; ``patches`` one row an
    output position and one column an entry of the flattened kernel.

    Args:
        weights: the weights to wait for, by name.
        record: what to do with each input.
        rows: how many rows of a convolution's patches to take from one batch at most.
    """

    def __init__(self, weights: Mapping[str, Tensor], record: Record, *, rows: int = 8192) -> None:
        super().__init__()
        self.names = {id(weight): name for name, weight in weights.items()}
        self.record = record
        self.rows = rows

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear or func in _CONVOLUTIONS:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            name = self.names.get(id(weight))
            if name is not None:
                x = (args[0] if args else kwargs["input"]).detach()
                if func is F.linear:
                    self.record(name, x.reshape(-1, x.shape[-1]), x.reshape(-1, x.shape[-1]))
                else:
                    options = dict(zip(("bias", "stride", "padding", "dilation", "groups"), args[2:], strict=False))
                    options |= {key: value for key, value in kwargs.items() if key not in ("input", "weight")}
                    if options.get("groups", 1) == 1:
                        channels = x.movedim(1, -1).reshape(-1, x.shape[1])
                        self.record(name, channels, self._patches(x, weight, _CONVOLUTIONS[func], options))
        if func is F.multi_head_attention_forward:
            self._record_attention(inspect.signature(func).bind(*args, **kwargs).arguments)
        return func(*args, **kwargs)

    def _record_attention(self, given: Mapping[str, Any]) -> None:
        """Inputs of the projections into and out of the heads, which run inside one function."""
        name = self.names.get(id(given.get("in_proj_weight")))
        query = given["query"].detach()
        if name is not None and given["query"] is given["key"] is given["value"]:
            x = query.reshape(-1, query.shape[-1])
            self.record(name, x, x)
        name = self.names.get(id(given["out_proj_weight"]))
        if name is not None:
            unprojected = {"out_proj_weight": torch.eye(query.shape[-1]).to(query), "out_proj_bias": None}
            x = F.multi_head_attention_forward(**{**given, **unprojected})[0].detach()
            self.record(name, x.reshape(-1, x.shape[-1]), x.reshape(-1, x.shape[-1]))

    def _patches(self, x: Tensor, weight: Tensor, spatial: int, options: Mapping[str, Any]) -> Features:
        """Inputs of the kernel at every output position, the columns in the order of ``weight[0].flatten()``."""
        stride, dilation = (_tuple(options.get(key, 1), spatial) for key in ("stride", "dilation"))
        kernel = weight.shape[2:]
        padding = options.get("padding", 0)
        if padding == "same":
            total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            pads = [(t // 2, t - t // 2) for t in total]
        else:
            pads = [(p, p) for p in _tuple(0 if padding == "valid" else padding, spatial)]
        x = F.pad(x, [side for pair in reversed(pads) for side in pair])
        sizes = [
            (n - d * (k - 1) - 1) // s + 1 for n, d, k, s in zip(x.shape[2:], dilation, kernel, stride, strict=True)
        ]
        views = []
        for offset in itertools.product(*map(range, kernel)):
            view = x
            for axis, (o, d, s, size) in enumerate(zip(offset, dilation, stride, sizes, strict=True)):
                view = view.narrow(axis + 2, o * d, s * (size - 1) + 1)
                view = view[(slice(None),) * (axis + 2) + (slice(None, None, s),)]
            views.append(view)
        count = len(x) * math.prod(sizes)
        if count > self.rows:  # taken before anything is put together: the others would be many
            chosen = torch.randperm(count, generator=keyed_generator("patches", count))[: self.rows]
            places = torch.unravel_index(chosen.to(x.device), (len(x), *sizes))
            return torch.stack([view.movedim(1, -1)[places] for view in views], dim=2).flatten(1)
        positions = torch.stack(views, dim=2).flatten(3).movedim(-1, 1)
        return positions.reshape(-1, x.shape[1] * len(views))


def _tuple(value: Any, length: int) -> tuple[int, ...]:
    return (value,) * length if isinstance(value, int) else tuple(value) * (length // len(value))
