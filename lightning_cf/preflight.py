"""What a run checks before it trains anything."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_cf.errors import CapacityError, ContinualError
from lightning_cf.files import load_tensors
from lightning_cf.ledger import CHECKPOINT_KEY
from lightning_cf.state import ContinualState
from lightning_cf.tasks import Task


def check_tasks(tasks: Sequence[Any]) -> None:
    """Raises ContinualError for tasks that cannot be told apart or have no data."""
    if not tasks:
        raise ContinualError("runner: tasks is empty; give at least one Task.")
    for task in tasks:
        if not isinstance(task, Task):
            raise ContinualError(f"runner: tasks must be Task objects, got a {type(task).__name__}.")
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise ContinualError(f"runner: two tasks are called '{name}'; give each a name of its own.")
    for task in tasks:
        task.prepare_data()
        task.setup("fit")
        task.setup("test")
        with isolate_rng():
            task.check_data()


def check_widths(state: ContinualState, names: Sequence[str]) -> None:
    """Raises CapacityError for a layer to be partitioned that has fewer units than tasks of these names run it."""
    ran = [group.name for name in names for group in state.structure.groups_on(state.structure.way_of(name))]
    for group in state.structure.groups:
        tasks = ran.count(group.name)
        if group.name not in state.ledger.whole and group.size < tasks:
            raise CapacityError(
                f"runner: '{group.name}' has {group.size} units for {tasks} tasks, each of which must own"
                " at least one. Widen the layer, or give fewer tasks."
            )


def load_pretrained(module: LightningModule, path: str | Path) -> None:
    """Loads weights that were trained on the first task.

    Args:
        module: in place.
        path: a Lightning checkpoint, or a ``state_dict`` that ``torch.save`` wrote.

    Raises:
        ContinualError: if there is no such file, it holds a sequence of tasks already, or it does not fit the module.
    """
    if not Path(path).is_file():
        raise ContinualError(f"runner: pretrained={str(path)!r} is no file; give a checkpoint, or True.")
    found = load_tensors(path, f"runner: pretrained={str(path)!r} is no checkpoint that torch.load reads.")
    if isinstance(found, dict) and found.get(CHECKPOINT_KEY, {}).get("tasks"):
        names = ", ".join(task["name"] for task in found[CHECKPOINT_KEY]["tasks"])
        raise ContinualError(
            f"runner: pretrained={str(path)!r} holds a network with a ledger of its own (tasks {names}); start from one"
            " without."
        )
    weights = found.get("state_dict", found) if isinstance(found, dict) else {}
    own = {name for name in module.state_dict() if not name.endswith("_extra_state")}
    try:
        missing, unexpected = module.load_state_dict(weights, strict=False)
    except (RuntimeError, TypeError) as error:
        raise ContinualError(f"runner: pretrained={str(path)!r} does not fit the module: {error}") from error
    strange = [*(name for name in missing if name in own), *unexpected]
    if strange:
        raise ContinualError(
            f"runner: pretrained={str(path)!r} does not fit the module: {len(strange)} names are in one of the two"
            f" only, such as {strange[0]!r}."
        )
