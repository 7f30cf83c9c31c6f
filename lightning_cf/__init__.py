"""Sequential tasks without forgetting, for PyTorch Lightning."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_cf.moved import install

install()  # former names of modules, for one release

__version__ = "0.1.0"  # the only place that says it: the build reads it here

if TYPE_CHECKING:
    from lightning_cf.api import *  # noqa: F403
    from lightning_cf.api import __all__ as __all__
else:

    def __getattr__(name: str) -> Any:
        """A public name, imported when it is first asked for: the command answers signals before torch is loaded."""
        if name.startswith("__") and name != "__all__":
            raise AttributeError(name)
        api = import_module("lightning_cf.api")
        if not hasattr(api, name):
            if name in globals():
                return globals()[name]  # a module that was loaded on the way
            raise AttributeError(f"module 'lightning_cf' has no attribute {name!r}")
        return globals().setdefault(name, getattr(api, name))

    def __dir__() -> list[str]:
        return sorted({*globals(), *import_module("lightning_cf.api").__all__})
