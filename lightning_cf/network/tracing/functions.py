"""What a trace sees of functions, not of the operations that they consist of, and of the decisions taken by them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from lightning_cf.network.tracing.reaching import WHOLE
from lightning_cf.network.tracing.reductions import Reduction
from lightning_cf.network.tracing.rules.norms import normalise
from lightning_cf.network.tracing.tracer import LabelTracer


class FunctionRules(TorchFunctionMode):
    """Sees functions whose operations would hide what they are: RMSNorm consists of a mean over units."""

    def __init__(self, tracer: LabelTracer, turned: int | None) -> None:
        super().__init__()
        self.tracer = tracer
        self.turned = turned

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        known = len(self.tracer.found.branches)
        out = self._run(func, args, kwargs or {})
        if isinstance(out, bool) and len(self.tracer.found.branches) > known:
            return self._decide(out, known)
        return out

    def _checked(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a function gives that reads its input to see whether it is allowed: nothing else is decided by that."""
        reads, branches = len(self.tracer.found.reads), len(self.tracer.found.branches)
        out = func(*args, **kwargs)
        del self.tracer.found.reads[reads:], self.tracer.found.branches[branches:]
        return out

    def _decide(self, out: bool, known: int) -> bool:
        """What an ``if`` on the network's input finds, or the opposite, to see what would run then."""
        del self.tracer.found.branches[known + 1 :]
        self.tracer.found.branches[known] = replace(self.tracer.found.branches[known], unknown=False)
        self.tracer.decisions += 1
        return out if self.tracer.decisions - 1 != self.turned else not out

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in (Tensor.tolist, Tensor.numpy, Tensor.__array__):
            self.tracer.read(args[0], f"Tensor.{func.__name__}")
        if func is F.one_hot and kwargs.get("num_classes", args[1] if len(args) > 1 else -1) > 0:
            return self._checked(func, args, kwargs)
        if func not in WHOLE:
            with self.tracer.formulas.function(self.tracer.path, Reduction.of(func, args, kwargs)):
                return func(*args, **kwargs)
        self.tracer.next(func)
        names = ("input", "normalized_shape", "weight", "eps")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        with _disable_current_modes():
            out = func(*args, **kwargs)
            self.tracer.settle([x for x in (given["input"], given.get("weight")) if x is not None])
            normalise(self.tracer, given["input"], len(given["normalized_shape"]), given.get("weight"), None, [out])
        return out
