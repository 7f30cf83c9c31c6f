"""How a forward pass is made visible: which module runs now, and no fused kernel that hides the operations within."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_cf.utilities.hooks import takes_hooks


@contextmanager
def following(
    module: nn.Module,
    running: list[str],
    entered: Callable[[Any], None] = lambda given: None,
    left: Callable[[Any], None] = lambda output: None,
) -> Iterator[None]:
    """Keeps a stack of the paths of the modules that run, the innermost last, meanwhile.

    The network's own forward is followed also where it is called by name, without the hooks of ``module(x)``.

    Args:
        module: the network.
        running: the stack.
        entered: takes what the innermost module is given, before it runs.
        left: takes what it returns.
    """

    def enter(path: str, child: nn.Module, args: Any, kwargs: Any) -> None:
        running.append(path)
        entered((args, kwargs))

    def leave(child: nn.Module, args: Any, output: Any) -> None:
        left(output)
        running.pop()

    with ExitStack() as stack:
        for path, child in module.named_modules():
            if child is module or not takes_hooks(child):
                continue
            before = child.register_forward_pre_hook(partial(enter, path), prepend=True, with_kwargs=True)
            stack.callback(before.remove)
            stack.callback(child.register_forward_hook(leave, always_call=True).remove)
        stack.enter_context(_forward_between(module, partial(enter, ""), leave))
        yield


@contextmanager
def _forward_between(module: nn.Module, before: Callable[..., None], after: Callable[..., None]) -> Iterator[None]:
    """Meanwhile a module's forward runs between two others, which get what hooks would get."""
    own, plain = module.__dict__.get("forward"), module.forward

    @wraps(plain)  # with its signature, by which its arguments may be chosen
    def forward(*args: Any, **kwargs: Any) -> Any:
        before(module, args, kwargs)
        output = None
        try:
            output = plain(*args, **kwargs)
            return output
        finally:
            after(module, args, output)

    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if own is not None:
            module.__dict__["forward"] = own


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Fused kernels off, so that the operations they consist of are seen."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="TF32 acceleration")
            with torch.backends.mkldnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH):
                yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
