"""Variables of the environment, for a while."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def environment_variable(name: str, value: str | None) -> Iterator[str | None]:
    """Meanwhile a variable of the environment has another value, or none; gives what it had."""
    before = os.environ.get(name)
    _set(name, value)
    try:
        yield before
    finally:
        _set(name, before)


def _set(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
