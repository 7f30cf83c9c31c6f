"""Thresholds between similarities, down to the next number that a computer tells apart."""

from __future__ import annotations

import math
import struct

from lightning_cf.partition.spanning_forest import Forest

TOLERANCE = 1e-9
"""Slack of every comparison with the threshold, so that rounding does not part identical units at threshold 1."""


def components_threshold(forest: Forest, count: int) -> float:
    """The lowest threshold at which the units form at least ``count`` connected components."""
    if forest.units == 1:
        return 1.0  # any other is as good
    if count == 1:
        return float(forest.similarities[-1])
    return threshold_above(float(forest.similarities[forest.units - count]))


def threshold_above(value: float) -> float:
    """A threshold that ``value`` does not reach, as little above it as doubles allow."""
    threshold = value + TOLERANCE
    while threshold - TOLERANCE <= value:
        threshold = math.nextafter(threshold, math.inf)
    return threshold


def place_of(value: float) -> int:
    """The place of a double among all doubles in their order, 0 for zero."""
    return int(math.copysign(1, value)) * int(struct.unpack("<q", struct.pack("<d", abs(value)))[0])


def double_at(place: int) -> float:
    """The double at a place."""
    return math.copysign(float(struct.unpack("<d", struct.pack("<q", abs(place)))[0]), place)
