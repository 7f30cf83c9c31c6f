"""Which of several strategies predicts, where held-out data are to say so."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_cf.errors import ContinualError, ContinualWarning, warn


def elected(strategies: tuple[str, ...], votes: Mapping[str, int]) -> tuple[str, ...]:
    """The strategies, first the one that told the task of the most samples.

    One that came before stays where another told no more than chance might: two standard deviations.

    >>> elected(("a", "b"), {"a": 50, "b": 90, "": 100}), elected(("a", "b"), {"a": 89, "b": 90, "": 100})
    (('b', 'a'), ('a', 'b'))

    Args:
        strategies: names; the first one predicts.
        votes: of how many samples each told the task, and under no name how many there were.
    """
    best = strategies[0]
    for name in strategies:
        mistakes = 2 * votes[""] - votes[name] - votes[best]
        if votes[name] - votes[best] > 2 * mistakes**0.5:
            best = name
    return (best, *(name for name in strategies if name != best))


def without(strategies: tuple[str, ...], name: str, error: Exception, *, several: bool) -> tuple[str, ...]:
    """The strategies but one that does not work, which is said; the error is raised if it was wanted by its name.

    Args:
        strategies: names.
        name: the one that does not work.
        error: what it raised.
        several: whether the best of several was to be found.
    """
    if not several or len(strategies) < 2:
        raise error
    reason = str(error) if isinstance(error, ContinualError) else f"{type(error).__name__}: {error}"
    warn(f"task_inference: {name} is left out from here on, since it does not work: {reason}", ContinualWarning)
    return tuple(other for other in strategies if other != name)
