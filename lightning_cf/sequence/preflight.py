"""What a run checks before it trains anything."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from lightning_cf.callbacks import InvarianceCallback, MaskedGradientCallback, PartitionCallback, TaskInferenceCallback
from lightning_cf.errors import CapacityError, ContinualError, check_choice, check_kind, check_list
from lightning_cf.learner.state import ContinualState
from lightning_cf.lightning_api import LightningModule, Trainer
from lightning_cf.ownership.ledger import ISOLATIONS
from lightning_cf.ownership.ledger_state import CHECKPOINT_KEY
from lightning_cf.sequence.scoring import SCORED
from lightning_cf.task_inference import Strategy
from lightning_cf.tasks.contexts import seeded
from lightning_cf.tasks.reading import Limits
from lightning_cf.tasks.task import Task
from lightning_cf.utilities.files import load_tensors, writing
from lightning_cf.utilities.randomness import isolated_generators

Method = Literal["partition", "finetune", "joint"]
METHODS: tuple[Method, ...] = ("partition", "finetune", "joint")


def check_parts(
    trainer: object, partition: object, invariance: object, masking: object, task_inference: object, pretrained: object
) -> None:
    """Raises ContinualError for arguments of the runner that are of another kind than it takes."""
    if isinstance(trainer, Trainer) or not callable(trainer):
        kind = "a Trainer, which fits once" if isinstance(trainer, Trainer) else f"a {type(trainer).__name__}"
        raise ContinualError(
            "runner: trainer must make Trainers from keywords, one a phase, such as Trainer itself or partial(Trainer,"
            f" accelerator='auto'); got {kind}."
        )
    kinds = {
        "partition": (partition, PartitionCallback),
        "invariance": (invariance, InvarianceCallback),
        "masking": (masking, MaskedGradientCallback),
    }
    for name, (value, kind_of) in kinds.items():
        if value is not None:
            check_kind("runner", name, value, kind_of, f"a {kind_of.__name__}(...), or None to leave it out")
    wanted = "the name of a strategy, a Strategy, a list of such, a TaskInferenceCallback(...), or None to leave it out"
    if task_inference is not None:
        kinds_of = (str, Strategy, list, tuple, TaskInferenceCallback)
        check_kind("runner", "task_inference", task_inference, kinds_of, wanted)
    check_kind("runner", "pretrained", pretrained, (bool, str, Path), "True, False or the path of a checkpoint")


def check_choices(*, isolation: object, method: object, score_on: object) -> None:
    """Raises ContinualError for options of the runner that are none of their choices."""
    check_choice("runner", "isolation", isolation, ISOLATIONS)
    check_choice("runner", "method", method, METHODS)
    check_choice("runner", "score_on", score_on, SCORED)


def listed_tasks(tasks: Any) -> list[Any]:
    """The runner's tasks as a list; raises ContinualError for what is no list."""
    if isinstance(tasks, Task):
        raise ContinualError(f"runner: tasks must be a list of Tasks, got one; give [Task('{tasks.name}', ...)].")
    return check_list("runner", "tasks", tasks, "Tasks")


def check_root(root: Path) -> None:
    """Raises ContinualError for a folder that cannot be made, since a file is in the way or nothing may be written."""
    with writing(root):
        there = next(place for place in (root, *root.absolute().parents) if place.exists())
    if not there.is_dir():
        raise ContinualError(
            f"runner: root={str(root)!r} cannot be a folder: {there} is a file, where a folder is needed. Choose"
            " another."
        )
    if not os.access(there, os.W_OK):
        raise ContinualError(f"runner: root={str(root)!r} cannot be written: {there} is read-only for this user.")


def check_tasks(tasks: Sequence[Any], host: Trainer, seed: int) -> list[Any]:
    """Raises ContinualError for tasks that cannot be told apart or have no data; gives the first batch of each.

    Args:
        tasks: all of the sequence.
        seed: what random splits depend on that their data draw when they are set up, with the task's name.
        host: a Trainer with the limits of those that will fit them, which their data know until then.
    """
    if not tasks:
        raise ContinualError("runner: tasks is empty; give at least one Task.")
    for task in tasks:
        if not isinstance(task, Task):
            raise ContinualError(f"runner: tasks must be Task objects, got a {type(task).__name__}.")
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise ContinualError(f"runner: two tasks are called '{name}'; give each a name of its own.")
    batches = []
    for task in tasks:
        task.host = host
        task.let_go()
        task.task_loaders.limits = Limits.of(host)
        task.prepare_data()
        with seeded(seed, "setup", task.name):
            task.setup("fit")
            task.setup("test")
        with isolated_generators():
            batches.append(task.check_data())
    return batches


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
