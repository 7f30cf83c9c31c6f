"""Slow and obvious versions of the package's mathematics, and inputs that are hard on the fast ones."""

import math

import torch
from hypothesis import strategies as st


def similarity(vectors, biases, bias_weight=1.0):
    """Every pair on its own, in Python's floats."""
    vectors, biases = vectors.double().tolist(), biases.double().tolist()

    def pair(i, j):
        ni, nj = magnitude(vectors[i]), magnitude(vectors[j])
        if ni == 0 and nj == 0:
            cosine = 1.0
        elif ni == 0 or nj == 0:
            cosine = 0.0
        else:
            cosine = math.fsum(a * b for a, b in zip(vectors[i], vectors[j], strict=True)) / (ni * nj)
        return max(-1.0, min(1.0, cosine)) - bias_weight * (biases[i] - biases[j]) ** 2

    return [[pair(i, j) for j in range(len(vectors))] for i in range(len(vectors))]


def magnitude(vector):
    return math.sqrt(math.fsum(x * x for x in vector))


def lead(vectors, biases, bias_weight, threshold, limit=None, slack=1e-9):
    """The representative of each unit, and the leaders in the order in which they were found."""
    s = similarity(vectors, biases, bias_weight)
    rows = vectors.double().tolist()
    leaders, representative = [], [None] * len(rows)
    for unit in sorted(range(len(rows)), key=lambda i: (-magnitude(rows[i]), i)):
        similar = [leader for leader in leaders if s[unit][leader] >= threshold - slack]
        if similar:
            representative[unit] = similar[0]
        elif limit is None or len(leaders) < limit:
            leaders.append(unit)
            representative[unit] = unit
        else:
            representative[unit] = max(leaders, key=lambda leader: (s[unit][leader], -leaders.index(leader)))
    return representative, leaders


def connect(vectors, biases, bias_weight, threshold, limit=None, slack=1e-9):
    """As ``lead``, where the clusters are what chains of similar pairs hold together: union-find over all pairs."""
    s = similarity(vectors, biases, bias_weight)
    rows = vectors.double().tolist()
    parent = list(range(len(rows)))

    def root(i):
        return i if parent[i] == i else root(parent[i])

    for i in range(len(rows)):
        for j in range(i):
            if s[i][j] >= threshold - slack:
                parent[root(i)] = root(j)
    largest = {}
    for unit in sorted(range(len(rows)), key=lambda i: (-magnitude(rows[i]), i)):
        largest.setdefault(root(unit), unit)
    leaders = list(largest.values())[:limit]
    representative = []
    for unit in range(len(rows)):
        own = largest[root(unit)]
        nearest = max(leaders, key=lambda leader: (s[unit][leader], -leaders.index(leader)))
        representative.append(own if own in leaders else nearest)
    return representative, leaders


@st.composite
def unit_groups(draw, most=14):
    """Vectors and biases full of duplicates, opposites, zeros, ties and far scales; every product is exact."""
    inputs = draw(st.integers(1, 4))
    pool = draw(st.lists(st.lists(st.integers(-3, 3), min_size=inputs, max_size=inputs), min_size=1, max_size=4))
    unit = st.tuples(
        st.sampled_from(pool),
        st.sampled_from([1, 1, 2, -1, 0]),
        st.sampled_from([0, 0, 0, 66, -66]),  # powers of two near 1e20 and 1e-20
        st.sampled_from([0.0, 0.0, 0.5, -1.0, 1e10, -1e18]),
    )
    units = draw(st.lists(unit, min_size=1, max_size=most))
    vectors = torch.tensor([[sign * x * 2.0**scale for x in row] for row, sign, scale, _ in units])
    return vectors, torch.tensor([bias for *_, bias in units])


@st.composite
def thresholds(draw, vectors, biases, bias_weight):
    """Round numbers, and similarities that occur."""
    s = similarity(vectors, biases, bias_weight)
    unit = st.integers(0, len(s) - 1)
    i, j = draw(unit), draw(unit)
    return draw(st.sampled_from([1.0, 0.5, 0.0, -1.0, -2.0, 1.1, s[i][j]]))
