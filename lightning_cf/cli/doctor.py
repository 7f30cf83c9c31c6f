"""``lightning-cf doctor``: what a report of a bug should say of the machine, and of how a network is seen."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

import lightning_cf
from lightning_cf.cli.sweep import RANK_VARIABLES
from lightning_cf.exactness.check import trainable_share
from lightning_cf.lightning_api import NAME
from lightning_cf.network.structure import UnitGroup
from lightning_cf.reporting.tables import table
from lightning_cf.sequence.runner import SequentialTaskRunner

PACKAGES = (
    "torch",
    "lightning",
    "pytorch-lightning",
    "torchmetrics",
    "hydra-core",
    "omegaconf",
    "numpy",
    "scipy",
    "scikit-learn",
)


def environment() -> str:
    """Versions, devices and the process's place among others, a line each."""
    lines = [("lightning_cf", lightning_cf.__version__), ("python", platform.python_version())]
    lines += [(name, _version(name)) for name in PACKAGES]
    lines += [("Lightning in use", NAME), ("system", platform.platform()), ("devices", "; ".join(_devices()))]
    lines += [(name, os.environ[name]) for name in RANK_VARIABLES if name in os.environ]
    return "\n".join(f"{name:<18}{value}" for name, value in lines)


def network(runner: SequentialTaskRunner) -> str:
    """How a runner's network was traced: its groups of units, what is left to later tasks, and what mixes units.

    Args:
        runner: one that was started, which checks the network.
    """
    structure, ledger = runner.state.structure, runner.state.ledger

    def later(group: UnitGroup) -> str:
        if group.name not in ledger.whole:
            return "shared out"
        return "first task only: one fate" if group.size == 1 else "first task only: left out"

    rows = [[group.name, later(group), str(group.size), ", ".join(group.layers[1:])] for group in structure.groups]
    rows.append([structure.head_layer, "outputs", str(structure.head.size), ", ".join(structure.head.layers[1:])])
    lines = [table(["layer", "tasks", "units", "layers of the same units"], rows), ""]
    share = trainable_share(runner.module, structure, ledger)
    lines.append(f"isolation={ledger.isolation}; later tasks can train {share:.1%} of the parameters")
    lines += [f"normalises units together: {name}" for name in structure.norms]
    lines += dict.fromkeys(mixing.message() for mixing in structure.mixings)
    if structure.ways > 1:
        lines.append(f"{structure.ways} ways through the network")
    return "\n".join(lines)


def _version(package: str) -> str:
    if package == "torch":
        return torch.__version__  # with what it was built for
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _devices() -> list[str]:
    found = [f"cuda:{index} {torch.cuda.get_device_name(index)}" for index in range(torch.cuda.device_count())]
    if sys.platform == "darwin" and torch.backends.mps.is_available():
        found.append("mps")
    return [*found, f"cpu, {os.cpu_count()} cores, {torch.get_num_threads()} threads"]
