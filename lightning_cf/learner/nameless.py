"""Whether a forward pass without a task's name is the one that the task is scored by."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_cf.learner.state import ContinualState
from lightning_cf.lightning_api import LightningModule, is_overridden
from lightning_cf.network.forward import call, same_state
from lightning_cf.task_inference import Sites, read
from lightning_cf.task_inference.read_variants import input_of
from lightning_cf.tasks.evaluation import forward_context, on_device, predict
from lightning_cf.tasks.task import Task, supervised
from lightning_cf.tasks.training_batches import first_batch
from lightning_cf.utilities.randomness import isolated_generators, seed_all


def forward_is_told(module: LightningModule, state: ContinualState, task: Task) -> bool:
    """Whether a task's ``evaluate`` tells the forward pass more than the input, and outputs hang on that.

    Where ``evaluate`` runs other methods than ``forward``, and what they give is something else, that is said once: it
    may prepare the input, which nobody can tell from saying which task it is.
    """
    if task.evaluate is supervised or not is_overridden("forward", module, parent=LightningModule):
        return False
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))

    with isolated_generators(), same_state(module):
        batch = first_batch(module, task)
        with module.register_forward_pre_hook(note, with_kwargs=True):
            scored = _outputs(module, state, task, partial(predict, module, task, batch))
        args, kwargs = calls[0] if calls else ((), {})
        told = not all(_tensors(x) for x in (*args, *kwargs.values()))
        if calls and not told and scored is not None:
            return False
        if told:
            kept = [x for x in args if _tensors(x)], {name: x for name, x in kwargs.items() if _tensors(x)}
            run = partial(module, *kept[0], **kept[1])
        else:
            run = partial(call, module, input_of(module, on_device(module, task, batch)))
        alone = _outputs(module, state, task, run)
    if calls and scored is None and alone is None:
        return True  # it shows the outputs of some tasks only, and cannot run without what it is told
    if scored is None or alone is None or scored.shape != alone.shape:
        return False
    differs = not torch.allclose(scored, alone, rtol=1e-2, atol=1e-3, equal_nan=True)
    if differs and not calls:
        state.tell(
            f"Task '{task.name}': its evaluate= does not run forward, which gives other outputs for the same batch, and"
            " predictions without a task's name run forward. If evaluate= prepares the input, prepare it alike there;"
            " if it says which task it is, name this task where it is predicted."
        )
    return differs and bool(calls)


def _tensors(x: Any) -> bool:
    """Whether an argument says nothing but what tensors do."""
    leaves = tree_leaves(x)
    return bool(leaves) and all(isinstance(leaf, Tensor) for leaf in leaves)


def _outputs(module: LightningModule, state: ContinualState, task: Task, run: Any) -> Tensor | None:
    """Raw outputs of one forward pass; None where it fails, or leaves an output layer out."""
    sites = Sites(None, (), Sites.output_layers(state.structure), torch.tensor(state.outputs_of(task)))
    seed_all(0)
    try:
        with forward_context(module):
            found = read(module, [sites], run)
    except Exception:  # whatever a user's forward pass raises
        return None
    return None if found.missing else found.outputs
