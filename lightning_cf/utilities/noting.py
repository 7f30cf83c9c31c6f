"""Takes note of the warnings that a piece of work gives, whatever the user's filters then do with them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning_cf.errors import ContinualWarning


@contextmanager
def noting(notes: list[str]) -> Iterator[None]:
    """Meanwhile the text of each of our warnings is added to ``notes``, and shown as the filters have it, but once.

    >>> notes = []
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore")
    ...     with noting(notes):
    ...         warnings.warn("the same", ContinualWarning)
    ...         warnings.warn("the same", ContinualWarning)
    >>> notes
    ['the same']

    Args:
        notes: what was noted before is not shown again.
    """
    filters, show = list(warnings.filters), warnings.showwarning

    def note(message: Warning | str, category: type[Warning], filename: str, line: int, *more: Any) -> None:
        if not issubclass(category, ContinualWarning):
            show(message, category, filename, line, *more)
            return
        if str(message) in notes:
            return
        notes.append(str(message))
        with warnings.catch_warnings():
            warnings.filters[:] = filters  # type: ignore[index]
            warnings.showwarning = show
            warnings.warn_explicit(message, category, filename, line)

    with warnings.catch_warnings():
        warnings.simplefilter("always", ContinualWarning)
        warnings.showwarning = note  # type: ignore[assignment]
        yield
