"""What is kept to infer tasks by, as plain containers for a checkpoint, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_cf.task_inference.known import Known
from lightning_cf.task_inference.sites import Sites, kept

_PLAIN = ("unit", "training_task", "left_out", "budget", "seed", "votes", "apart", "nested")

Tensors = Mapping[str, Mapping[str, Tensor]]


def packed(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors and plain containers that ``torch.load(weights_only=True)`` reads.

    Args:
        fields: of a :class:`~lightning_cf.task_inference.TaskInference`, by name.
    """
    sites = fields["training_sites"]
    return {
        **{name: fields[name] for name in _PLAIN},
        "strategies": list(fields["strategies"]),
        "training_sites": None if sites is None else sites.state_dict(),
        "looks": None if fields["looks"] is None else fields["looks"].state_dict(),
        "training": _each(fields["training"]),
        "shared": _each(fields["shared"]),
        "tasks": [task.state_dict() for task in fields["tasks"]],
    }


def unpacked(state: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that :func:`packed` was given, on the CPU; also of what older versions packed, which had fewer."""
    sites, looks = state["training_sites"], state.get("looks")
    return {
        **{name: state[name] for name in _PLAIN if name in state},
        "strategies": tuple(state["strategies"]),
        "training_sites": None if sites is None else Sites.from_state_dict(sites),
        "looks": None if looks is None else Sites.from_state_dict(looks),
        "training": _each(state["training"]),
        "shared": _each(state.get("shared", {})),
        "tasks": [Known.from_state_dict(task) for task in state["tasks"]],
    }


def _each(values: Tensors) -> dict[str, dict[str, Tensor]]:
    return {name: {key: kept(value) for key, value in own.items()} for name, own in values.items()}
