"""Whether two descriptions are of the same run: where they differ, and what of that ``allow`` lets through."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_cf.errors import ContinualError
from lightning_cf.utilities.describing import UNKNOWN

FIXED = ("method", "isolation", "order", "tasks", "parameters", "network")
"""What no ``allow`` can change: what was learned would not fit."""

VARIABLE = (
    *("epochs", "invariance_epochs", "seed", "score_on", "pretrained", "partition", "invariance", "masking"),
    *("task_inference", "processes", "architecture", "code", "hyperparameters", "optimizer", "trainer", "callbacks"),
    *("data", "configuration"),
)
"""What ``allow`` may name, alone or with a name within it."""

_WHOLE = ("architecture", "parameters", "network", "tasks", "data", "invariance", "masking")
"""Where a name that only one of two runs has is a difference; elsewhere another version may know of more options."""

_NEWER = ("sampler", "batch", "labels")
"""What earlier versions did not know of: a name that only one of two runs has is no difference there."""

_COUNTS = (
    *(f"trainer.{name}_batches" for name in ("limit_train", "limit_val", "limit_test", "overfit")),
    "trainer.val_check_interval",
)
"""Where 1 is a batch and 1.0 is all of them."""


def differences(found: Any, wanted: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """Where two descriptions differ: name, what was found, what is wanted now; what is unknown does not differ."""
    if any(isinstance(each, str) and each == UNKNOWN for each in (found, wanted)):
        return []
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        group, last = path.partition(".")[0], path.rpartition(".")[2]
        optional = group not in _WHOLE or last == "code"
        result = []
        for key in dict.fromkeys([*found, *wanted]):
            name = f"{path}.{key}" if path else str(key)
            if key in found and key in wanted:
                result += differences(found[key], wanted[key], name)
            elif not optional and key not in _NEWER:
                result.append((name, found.get(key, "nothing"), wanted.get(key, "nothing")))
        return result
    lists = isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted)
    if lists and all(isinstance(each, (Mapping, list, float)) for each in [*found, *wanted]):
        pairs = enumerate(zip(found, wanted, strict=True))
        return [each for i, pair in pairs for each in differences(*pair, f"{path}.{i}")]
    return [] if _same(found, wanted, path) else [(path, found, wanted)]


def check_same(folder: Any, found: Any, wanted: Any, allow: Sequence[str]) -> list[str]:
    """Compares two runs.

    Returns:
        the differences that were allowed, in words.

    Raises:
        ContinualError: names those that were not.
    """
    allowed: list[tuple[str, str]] = []
    refused: list[tuple[str, str]] = []
    for name, was, now in differences(found, wanted):
        told = f"{name}={_short(was)}, not {_short(now)}"
        meant = name.partition(".")[0] not in FIXED and any(name == a or name.startswith(f"{a}.") for a in allow)
        (allowed if meant else refused).append((name, told))
    if refused:
        shown = "; ".join(told for _, told in refused[:5])
        more = f"; and {len(refused) - 5} differences more" if len(refused) > 5 else ""
        names = list(dict.fromkeys(name.partition(".")[0] for name, _ in refused))
        fixed = [name for name in names if name in FIXED]
        way = "" if fixed else f", or allow={names} to go on with them changed"
        raise ContinualError(
            f"The folder {folder} holds a run with {shown}{more}; go on with the same settings, or choose another"
            f" folder{way}."
        )
    return [told for _, told in allowed]


def check_allow(allow: Sequence[str]) -> list[str]:
    """The names of what may differ.

    Raises:
        ContinualError: for one that is nothing that runs are told apart by, or that cannot differ.
    """
    if isinstance(allow, str) or not all(isinstance(name, str) for name in allow):
        raise ContinualError(f"runner: allow must be a list of names such as ['optimizer'], got {allow!r}.")
    for name in allow:
        group = name.partition(".")[0]
        if group in FIXED:
            raise ContinualError(
                f"runner: allow names '{name}': what was learned would not fit. Choose another folder."
            )
        if group not in VARIABLE:
            raise ContinualError(
                f"runner: allow names '{name}', which runs are not told apart by; these are: {', '.join(VARIABLE)}."
            )
    return list(allow)


def _same(found: Any, wanted: Any, path: str) -> bool:
    if path in _COUNTS and type(found) is not type(wanted):
        return False  # a batch is not all of them
    approximate = path.startswith("data.") and isinstance(found, float) and isinstance(wanted, float)
    return math.isclose(found, wanted, rel_tol=1e-4, abs_tol=1e-4) if approximate else bool(found == wanted)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:100]}... ({hashlib.sha256(text.encode()).hexdigest()[:8]})"
