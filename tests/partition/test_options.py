import json
import math
import re
import threading
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import partial
from typing import get_type_hints

import networks
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import build
from torch import nn

from lightning_cf.errors import ContinualError
from lightning_cf.network.tracing.trace import trace
from lightning_cf.partition.options import MEASURES, PartitionKeywords, PartitionOptions


def _label(value):
    """Names of tests that are the same in every process."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


def distance(vectors_a, biases_a, vectors_b, biases_b):
    return -torch.cdist(vectors_a, vectors_b)


class Locked:
    """A measure that cannot be copied."""

    def __init__(self):
        self.lock = threading.Lock()

    def __call__(self, vectors_a, biases_a, vectors_b, biases_b):
        return distance(vectors_a, biases_a, vectors_b, biases_b)

    def method(self, vectors_a, biases_a, vectors_b, biases_b):
        return self(vectors_a, biases_a, vectors_b, biases_b)


@dataclass
class Scaled:
    """A measure that is a dataclass."""

    scale: torch.Tensor

    def __call__(self, vectors_a, biases_a, vectors_b, biases_b):
        return self.scale * distance(vectors_a, biases_a, vectors_b, biases_b)


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"measure": "weights"}, r"measure must be one of weight, update, activation, got 'weights'"),
        ({"measure": None}, r"measure must be one of weight, update, activation, got None"),
        ({"threshold": 1.5}, r"threshold must be a number in \[-1, 1\] or 'auto', got 1.5"),
        ({"threshold": -1.01}, r"threshold must be a number in \[-1, 1\] or 'auto', got -1.01"),
        ({"threshold": math.nan}, r"threshold must be .*, got nan"),
        ({"threshold": True}, r"threshold must be .*, got True"),
        ({"threshold": "0.5"}, r"threshold must be .*, got '0.5'"),
        ({"threshold": None}, r"threshold must be .*, got None"),
        ({"measure": distance, "threshold": math.inf}, r"threshold must be a finite number or 'auto', got inf"),
        ({"measure": distance, "threshold": math.nan}, r"threshold must be a finite number or 'auto', got nan"),
        ({"measure": distance, "threshold": False}, r"threshold must be a finite number or 'auto', got False"),
        ({"tolerance": -0.1}, r"tolerance must be a finite number of at least 0, got -0.1"),
        ({"tolerance": math.nan}, r"tolerance must be a finite number"),
        ({"min_claim": 0}, r"min_claim must be a share in \(0, 1\], got 0"),
        ({"min_claim": 1.1}, r"min_claim must be a share in \(0, 1\], got 1.1"),
        ({"max_claim": 0.0}, r"max_claim must be a share in \(0, 1\], got 0.0"),
        ({"max_claim": 1.5}, r"max_claim must be a share in \(0, 1\], got 1.5"),
        ({"max_claim": math.nan}, r"max_claim must be a share"),
        ({"max_claim": 0.1, "min_claim": 0.2}, r"max_claim \(0.1\) must not be below min_claim \(0.2\)"),
        ({"max_claim": 0.04}, r"max_claim \(0.04\) must not be below min_claim \(0.05\)"),
        ({"min_trainable": 2}, r"min_trainable must be a share in \[0, 1\], got 2"),
        ({"reserve_tasks": 0}, r"reserve_tasks must be a whole number of at least 1, got 0"),
        ({"reserve_tasks": 1.5}, r"reserve_tasks must be a whole number"),
        ({"reserve_tasks": True}, r"reserve_tasks must be a whole number"),
        ({"clusters": "single"}, r"clusters must be one of leader, components, got 'single'"),
        ({"representative": "largest"}, r"representative must be one of magnitude, random, got 'largest'"),
        ({"layers": "net.1"}, r"layers must be a list of layer names, got the string 'net.1'"),
        ({"exclude": "net.1"}, r"exclude must be a list of layer names, got the string 'net.1'"),
    ],
    ids=_label,
)
def test_what_cannot_work_is_refused(options, message, unchecked):
    with pytest.raises(ContinualError, match=f"^partition: {message}"):
        PartitionOptions(**options)


@pytest.mark.parametrize(
    "options",
    [
        *({"threshold": threshold} for threshold in (-1, 1, 0, 0.5, -1.0, "auto")),
        {"measure": distance, "threshold": -1000.0},
        {"tolerance": 0, "min_claim": 1, "max_claim": 1},
        {"min_claim": 0.3, "max_claim": 0.3},
    ],
    ids=_label,
)
def test_the_ends_of_each_range_are_allowed(options):
    assert all(getattr(PartitionOptions(**options), name) == value for name, value in options.items())


def test_options_do_not_change():
    with pytest.raises(AttributeError):
        PartitionOptions().threshold = 0.5
    with pytest.raises(TypeError):
        PartitionOptions("weight")


# As plain values


@pytest.mark.parametrize(
    ("measure", "name"),
    [
        *((measure, measure) for measure in MEASURES),
        (distance, "test_options.distance"),
        (Locked(), "test_options.Locked"),
        (Locked().method, "test_options.Locked.method"),
        (Scaled(torch.ones(3)), "test_options.Scaled"),
        (nn.Bilinear(2, 2, 1), "torch.nn.modules.linear.Bilinear"),
        (partial(distance), "test_options.distance()"),
        ([].count, "builtins.list.count"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_options_of_any_measure_are_plain_values(measure, name):
    options = PartitionOptions(measure=measure, threshold=0.5, layers=["a", "b"], exclude=["c"])
    values = options.as_dict()
    assert list(values) == [field.name for field in fields(PartitionOptions)]
    read = json.loads(json.dumps(values, allow_nan=False))
    assert read["layers"] == ["a", "b"]
    assert read["exclude"] == ["c"]
    assert read["threshold"] == 0.5
    assert read["max_claim"] is None
    assert read["measure"] == name
    assert options.measure is measure


def test_a_lambda_is_named_by_where_it_is():
    name = PartitionOptions(measure=lambda a, b, c, d: a @ c.T).measure_name
    assert name == "test_options.test_a_lambda_is_named_by_where_it_is.<locals>.<lambda>"


def test_names_are_copied():
    names = ["a"]
    options = PartitionOptions(layers=names, exclude=names)
    names.append("b")
    assert (options.layers, options.exclude) == (("a",), ("a",))
    assert options == PartitionOptions(layers=("a",), exclude=["a"])


def test_null_in_a_config_leaves_nothing_out(unchecked):
    assert PartitionOptions(layers=None, exclude=None) == PartitionOptions()


def test_keywords_are_the_options():
    assert get_type_hints(PartitionKeywords) == get_type_hints(PartitionOptions)


# Which layers


def resnet():
    network, example = build(networks.resnet)
    return trace(network, example)


def test_all_layers_are_partitioned_unless_named():
    structure = resnet()
    first, *others = structure.groups
    assert PartitionOptions().partitioned(structure) == list(structure.groups)
    for layer in first.layers:  # a group goes by any layer of it
        assert PartitionOptions(layers=[layer]).partitioned(structure) == [first]
        assert PartitionOptions(exclude=[layer]).partitioned(structure) == others
    both = [first.layers[-1], others[-1].layers[0]]
    assert PartitionOptions(layers=both[::-1]).partitioned(structure) == [first, others[-1]]
    assert PartitionOptions(layers=both, exclude=both[:1]).partitioned(structure) == [others[-1]]
    assert len(first.layers) > 1


@pytest.mark.parametrize("option", ["layers", "exclude"])
def test_layers_that_are_not_there_are_named(option):
    structure = resnet()
    head = structure.head_layer
    with pytest.raises(ContinualError, match=f"{option} names '{head}', .* it has .*{structure.groups[0].name}"):
        PartitionOptions(**{option: [structure.groups[0].name, head]}).partitioned(structure)


def test_no_layer_left_is_refused():
    structure = resnet()
    every = [layer for group in structure.groups for layer in group.layers]
    for options in ({"exclude": every}, {"layers": []}, {"layers": every[:1], "exclude": every[:1]}):
        with pytest.raises(ContinualError, match="layers and exclude leave no layer to partition"):
            PartitionOptions(**options).partitioned(structure)


@pytest.mark.parametrize("apart", [False, True])
def test_units_that_a_gate_scales_are_told_from_those_that_an_operation_mixes(apart):
    structure = trace(Gated(), torch.randn(4, 6), apart=apart)
    with pytest.raises(ContinualError, match=r"no layer to partition.* multiplied .* under either isolation") as found:
        PartitionOptions().partitioned(structure)
    assert ("isolation='perturb' keeps apart" in str(found.value)) is not apart  # which would refuse it as well


class Gated(nn.Module):
    """Experts, summed with the weights of a gate."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 5) for _ in range(3))
        self.gate, self.head = nn.Linear(6, 3), nn.Linear(5, 2)

    def forward(self, x):
        given = torch.stack([expert(x) for expert in self.experts], dim=1)
        return self.head((self.gate(x).softmax(-1)[..., None] * given).sum(1))


# How many units


@given(st.integers(1, 100), st.integers(1, 3000), st.data())
def test_the_cap_is_the_share_rounded_down_exactly(hundredths, size, data):
    free = data.draw(st.integers(1, size))
    options = PartitionOptions(max_claim=hundredths / 100, min_claim=0.01)
    cap = max(1, math.floor(Fraction(hundredths, 100) * size))
    assert options.budget(size, free, 1) == min(cap, free)


@given(st.integers(1, 200), st.integers(1, 10), st.integers(1, 10))
def test_without_a_cap_the_free_units_are_shared_out(free, tasks_left, reserved):
    budget = PartitionOptions(reserve_tasks=reserved).budget(200, free, tasks_left)
    most = max(tasks_left, reserved)
    assert budget == max(1, free // most)
    assert budget * most <= max(free, most)


@given(
    st.integers(1, 300),
    st.integers(1, 12),
    st.one_of(st.none(), st.floats(0.05, 1.0)),
    st.integers(1, 12),
)
def test_tasks_that_claim_their_budget_leave_room_for_those_to_come(size, tasks, max_claim, reserved):
    options, free = PartitionOptions(max_claim=max_claim, reserve_tasks=reserved), size
    for left in range(tasks, 0, -1):
        if free == 0:
            assert size < tasks
            return
        budget = options.budget(size, free, left)
        assert 1 <= budget <= free
        free -= budget


@given(st.integers(1, 100), st.integers(1, 100), st.integers(1, 10))
def test_budgets_grow_with_the_cap_and_shrink_with_the_tasks_to_come(size, hundredths, tasks_left):
    def budget(hundredths, tasks_left):
        return PartitionOptions(max_claim=hundredths / 100, min_claim=0.01).budget(size, size, tasks_left)

    assert budget(hundredths, tasks_left) <= budget(min(100, hundredths + 7), tasks_left)
    assert budget(hundredths, tasks_left) >= budget(hundredths, tasks_left + 1)


def test_measures_with_arguments_of_their_own_are_told_apart():
    names = [PartitionOptions(measure=partial(_distance, power=power)).measure_name for power in (1, 2)]
    assert names == [f"{__name__}._distance(power={power})" for power in (1, 2)]


def _distance(a, bias_a, b, bias_b, power):
    return -(torch.cdist(a, b) ** power)


def test_a_module_stands_for_the_layers_in_it():
    first = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6))
    network = nn.Sequential(first, nn.Linear(6, 7), nn.Linear(7, 2))
    structure = trace(network, torch.ones(2, 4))
    assert [group.name for group in PartitionOptions(exclude=["0"]).partitioned(structure)] == ["1"]
    assert [group.name for group in PartitionOptions(layers=["0"]).partitioned(structure)] == ["0.0", "0.2"]
    with pytest.raises(ContinualError, match=r"exclude names '0\.1', but the network has no such layer"):
        PartitionOptions(exclude=["0.1"]).partitioned(structure)


def test_shares_may_be_given_a_task():
    options = PartitionOptions(min_claim=[0.6, 0.1], max_claim=[0.6, 0.2, 0.3])
    found = [(each.min_claim, each.max_claim) for each in map(options.of_task, range(5))]
    assert found == [(0.6, 0.6), (0.1, 0.2), (0.1, 0.3), (0.1, 0.3), (0.1, 0.3)]
    assert PartitionOptions().of_task(3) == PartitionOptions()
    assert PartitionOptions(max_claim=[0.5]).of_task(7).max_claim == 0.5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"min_claim": []}, "min_claim must be a share of a layer, or a list of one a task; got none"),
        ({"min_claim": [0.5, 2]}, "min_claim must be a share in (0, 1], got 2"),
        ({"max_claim": [0.5, "a"]}, "max_claim must be a share in (0, 1], got 'a'"),
        ({"min_claim": [0.5, 0.2], "max_claim": 0.3}, "max_claim (0.3) must not be below min_claim (0.5)"),
        ({"max_claim": [0.5, 0.01]}, "max_claim (0.01) must not be below min_claim (0.05)"),
    ],
)
def test_shares_a_task_that_cannot_be_are_refused_at_once(given, message):
    with pytest.raises(ContinualError) as error:
        PartitionOptions(**given)
    assert message in str(error.value)
