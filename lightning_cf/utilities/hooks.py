"""What we hang on a user's modules works there, and nowhere else: it does not travel with copies, files and exports."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.jit._trace import is_tracing


def takes_hooks(module: nn.Module) -> bool:
    """Whether a hook can be hung on a module: scripted and traced ones refuse."""
    return not isinstance(module, torch.jit.ScriptModule)


class Hook:
    """A hook of ours on an object of the user's; in a copy or a pickle of that object it is one that does nothing.

    What it becomes is a function of Python's own, so that a process without ``lightning_cf`` reads the file. While a
    network is exported or traced it stands aside too: what comes out is the network.

    >>> import copy
    >>> layer = torch.nn.Linear(2, 1)
    >>> handle = layer.register_forward_hook(Hook(lambda layer, inputs, output: output + 100))
    >>> float(layer(torch.zeros(2)).detach()) > 50, float(copy.deepcopy(layer)(torch.zeros(2)).detach()) > 50
    (True, False)

    Args:
        function: what the hook does.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        """What the hook does; nothing while the network is exported or scripted."""
        if torch.compiler.is_exporting() or is_tracing():
            return None
        return self.function(*args)

    def __reduce__(self) -> Any:
        """``nullcontext().__exit__`` takes whatever it is called with and returns None."""
        return getattr, (nullcontext(), "__exit__")

    def __deepcopy__(self, memo: Any) -> Callable[..., Any]:
        return nullcontext().__exit__
