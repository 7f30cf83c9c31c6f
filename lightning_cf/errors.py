"""What the package raises when it is asked for something that cannot work, and what it warns with."""

from __future__ import annotations

import inspect
import math
import os
import sys
import unicodedata
import warnings
from collections.abc import Iterable
from numbers import Integral, Real
from pathlib import Path
from typing import Any


class ContinualError(ValueError):
    """A request that cannot be carried out; the message names the thing, the value and the way out."""


class StructureError(ContinualError):
    """A network whose units cannot be followed from layer to layer."""


class ContinualWarning(UserWarning):
    """Something works, but not as one would expect; the base of every warning that the package gives."""


class StructureWarning(ContinualWarning):
    """A network that works, but in which more units share one fate than its layers suggest."""


class FrozenWarning(ContinualWarning):
    """Something changed what belongs to earlier tasks; it was put back."""


class LedgerWarning(ContinualWarning):
    """Weights and ledger may not belong together."""


class DataWarning(ContinualWarning):
    """Data that are read, or judged on, in another way than one might think."""


class RunWarning(ContinualWarning):
    """A run that goes on, though something in its folder is not as the run left it."""


class CapacityError(ContinualError):
    """No free unit is left where a new task needs one."""


class DivergenceError(ContinualError):
    """Training left numbers that are not finite; what was there before is there again."""


class DivergenceWarning(ContinualWarning):
    """Numbers that were not finite were left out, or put back."""


class LeakError(ContinualError):
    """A claimed output still depends on something that may move."""


BETWEEN = (
    "lightning_cf",
    "lightning",
    "pytorch_lightning",
    "lightning_fabric",
    "torch",
    "hydra",
    "contextlib",
    "importlib",
    "jaxtyping",
)
"""Packages that may stand between us and the user's own code when something is to be warned of."""


def warn(text: str, category: type[ContinualWarning | DeprecationWarning]) -> None:
    """Warns of the line of the user's code that led here: filters of Lightning's own warnings leave ours alone.

    >>> with warnings.catch_warnings(record=True) as heard:
    ...     warnings.simplefilter("always")
    ...     warn("the claim is odd", ContinualWarning)
    >>> heard[0].category.__name__, str(heard[0].message)
    ('ContinualWarning', 'the claim is odd')
    """
    frame = sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in BETWEEN:
        frame = frame.f_back
    module, registry = frame.f_globals.get("__name__", ""), frame.f_globals.setdefault("__warningregistry__", {})
    warnings.warn_explicit(text, category, frame.f_code.co_filename, frame.f_lineno, module, registry)


def check_share(owner: str, name: str, value: Any, *, above_zero: bool = False) -> float:
    """Returns ``value`` if it is a share: in [0, 1], or in (0, 1] with ``above_zero``.

    Raises:
        ContinualError: names the owner, the option and the value otherwise.
    """
    if not _is_number(value) or not 0 <= value <= 1 or (above_zero and value == 0):
        interval = "(0, 1]" if above_zero else "[0, 1]"
        raise ContinualError(f"{owner}: {name} must be a share in {interval}, got {value!r}.")
    return float(value)


def check_count(owner: str, name: str, value: int, *, least: int = 1) -> int:
    """Returns ``value`` if it is a whole number of at least ``least``.

    Raises:
        ContinualError: names the owner, the option and the value otherwise.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ContinualError(f"{owner}: {name} must be a whole number of at least {least}, got {_shown(value)}.")
    return int(value)


def check_choice(owner: str, name: str, value: object, choices: tuple[str, ...]) -> str:
    """Returns ``value`` if it is one of ``choices``.

    Raises:
        ContinualError: names the owner, the option, the value and what may stand there otherwise.
    """
    if not isinstance(value, str) or value not in choices:
        raise ContinualError(f"{owner}: {name} must be one of {', '.join(choices)}, got {value!r}.")
    return value


def check_number(owner: str, name: str, value: float, *, least: float = -math.inf, above: float = -math.inf) -> float:
    """Returns ``value`` if it is a finite number of at least ``least`` and above ``above``.

    Raises:
        ContinualError: names the owner, the option and the value otherwise.
    """
    if not _is_number(value) or not math.isfinite(value) or value < least or value <= above:
        bound = f" of at least {least:g}" if least > -math.inf else f" above {above:g}" if above > -math.inf else ""
        raise ContinualError(f"{owner}: {name} must be a finite number{bound}, got {_shown(value)}.")
    return value


def check_flag(owner: str, name: str, value: bool) -> bool:
    """Returns ``value`` if it is True or False.

    Raises:
        ContinualError: names the owner, the option and the value otherwise.
    """
    if not isinstance(value, bool):
        raise ContinualError(f"{owner}: {name} must be True or False, got {_shown(value)}.")
    return value


def check_text(owner: str, name: str, value: str) -> str:
    """Returns ``value`` if it is a text that is not blank and holds no control characters.

    Raises:
        ContinualError: names the owner, the option and the value otherwise.
    """
    if not isinstance(value, str) or not value.strip():
        raise ContinualError(f"{owner}: {name} must be a text that is not blank, got {_shown(value)}.")
    if printable(value) != value:
        raise ContinualError(f"{owner}: {name} must be one line without control characters, got {value!r}.")
    return value


def check_path(owner: str, name: str, value: str | Path) -> Path:
    """Returns ``value`` as a path if it can be one: an empty one would be the current folder.

    Raises:
        ContinualError: names the owner, the option and the value otherwise.
    """
    text = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(text, str) or not text.strip() or "\0" in text:
        raise ContinualError(f"{owner}: {name} must be the path of a folder, got {_shown(value)}.")
    return Path(text)


def printable(text: str) -> str:
    r"""A text with its control characters, which a terminal would obey, written out; line breaks are some of them.

    >>> print(printable("a\x1b[31mb"))
    a\x1b[31mb
    """
    obeyed = ("Cc", "Cs", "Zl", "Zp")
    return "".join(repr(c)[1:-1] if unicodedata.category(c) in obeyed else c for c in text)


def check_kind(owner: str, name: str, value: object, kinds: type | tuple[type, ...], wanted: str) -> None:
    """Raises ContinualError unless ``value`` is of one of the ``kinds``, which ``wanted`` describes.

    A class, or a configuration, in place of what is made from it is the likeliest mistake; so the type is named.
    """
    if isinstance(value, type) or not isinstance(value, kinds):
        raise ContinualError(f"{owner}: {name} must be {wanted}, got {_shown(value)}.")


def check_function(owner: str, name: str, value: Any, arguments: str) -> None:
    """Raises ContinualError for what cannot be called with these arguments, as far as one can tell."""
    problem = f"got {_shown(value)}" if isinstance(value, type) or not callable(value) else ""
    if not problem:
        try:
            inspect.signature(value).bind(*(arguments.split(", ") if arguments else ()))
        except TypeError as error:
            problem = f"the one given takes others: {error}"
        except ValueError:  # a function in C that does not say
            pass
    if problem:
        raise ContinualError(f"{owner}: {name} must be a function of ({arguments}); {problem}.")


def check_list(owner: str, name: str, value: Any, of: str) -> list[Any]:
    """``value`` as a list; raises ContinualError for a text, a mapping and what cannot be listed."""
    if isinstance(value, (str, bytes, dict)) or not isinstance(value, Iterable):
        raise ContinualError(f"{owner}: {name} must be a list of {of}, got {_shown(value)}.")
    try:
        return list(value)
    except TypeError as error:  # a tensor without dimensions
        raise ContinualError(f"{owner}: {name} must be a list of {of}, got {_shown(value)}.") from error


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _shown(value: object) -> str:
    """A short value as it is written; of others, what they are."""
    if isinstance(value, type):
        return f"the class {value.__name__}; call it"
    text = repr(value)
    plain = value is None or isinstance(value, (bool, int, float, str, bytes, Real))
    return text if plain and len(text) <= 80 else f"a {type(value).__name__}"
