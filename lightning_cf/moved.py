"""Modules under the names that they had before the package got folders; each warns, and goes with the next release."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {
    "affine": "invariance.affine",
    "claiming": "partition.claim",
    "class_incremental": "sequence.class_incremental",
    "directions": "subspaces.learned_directions",
    "disturbance": "invariance.disturbance",
    "evaluation": "tasks.evaluation",
    "folding": "partition.regression",
    "freezing": "ownership.freezing",
    "inferring": "learner.inferring",
    "ledger": "ownership.ledger",
    "metrics": "sequence.accuracy_matrix",
    "normalisation": "ownership.owner_aware_norms",
    "operations": "network.tracing.operations",
    "options": "partition.options",
    "outputs": "ownership.output_view",
    "perturbation": "invariance.perturbations",
    "probe": "exactness.probe",
    "projection": "subspaces.projection",
    "report": "reporting",
    "result": "sequence.result",
    "runner": "sequence.runner",
    "similarity": "partition.similarity",
    "state": "learner.keeping",
    "steps": "learner.steps",
    "structure": "network.structure",
    "subspace": "subspaces.subspace",
    "sweep": "cli.sweep",
    "tracing": "network.tracing.trace",
    "unit_pictures": "reporting.unit_pictures",
}
"""Where the modules are now from which public names could be imported, or which the documentation named."""


ELSEWHERE = {"inferring": {"predict_any": "learner.predicting"}}
"""Names that the documentation had, which went to another module than the rest."""


class MovedFinder(MetaPathFinder, Loader):
    """Finds a module under its former name, asked only where Python finds none of that name.

    >>> finder = MovedFinder()
    >>> finder.find_spec("lightning_cf.ledger").name, finder.find_spec("lightning_cf.nothing")
    ('lightning_cf.ledger', None)
    """

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> Any:
        """The module of a former name, None for any other."""
        package, _, module = name.partition(".")
        return ModuleSpec(name, self) if package == "lightning_cf" and module in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        """Fills the module with what the present one holds, and warns the code that imports it."""
        from lightning_cf.errors import warn  # not before it is needed: this is loaded with the package

        now = f"lightning_cf.{MOVED[module.__name__.partition('.')[2]]}"
        warn(f"{module.__name__} is {now} now; the former name goes with the next release.", DeprecationWarning)
        present = import_module(now)
        vars(module).update({name: value for name, value in vars(present).items() if not name.startswith("__")})
        for name, place in ELSEWHERE.get(module.__name__.partition(".")[2], {}).items():
            setattr(module, name, getattr(import_module(f"lightning_cf.{place}"), name))


def install() -> None:
    """Lets the package's modules be found under their former names."""
    if not any(isinstance(finder, MovedFinder) for finder in sys.meta_path):
        sys.meta_path.append(MovedFinder())
