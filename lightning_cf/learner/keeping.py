"""State and ledger are kept beside a module: not in its state_dict, and in its pickle as plain values."""

from __future__ import annotations

import pickle
from typing import Any

from torch import nn

from lightning_cf.errors import ContinualError, StructureError, check_kind
from lightning_cf.learner.state import ContinualState, _packed
from lightning_cf.learner.ways import _traced, _traced_apart, _way
from lightning_cf.lightning_api import LightningModule
from lightning_cf.ownership.ledger import Isolation, NeuronLedger
from lightning_cf.ownership.owner_aware_norms import make_owner_aware
from lightning_cf.tasks.task import Task

_ATTRIBUTE = "_continual_state"


_PENDING = "_continual_ledger"


def state_of(module: nn.Module) -> ContinualState | None:
    """The state kept beside a module, or None before its first task."""
    state: ContinualState | dict[str, Any] | None = getattr(module, _ATTRIBUTE, None)
    if isinstance(state, dict):  # the module comes out of a pickle
        del module.__dict__[_ATTRIBUTE]
        ledger = NeuronLedger.from_state_dict(state["ledger"])
        try:
            kept = pickle.loads(state["state"])
        except Exception:  # it was made in another process, whose evaluate= is not there: a fit traces the module anew
            object.__setattr__(module, _PENDING, _Pending(ledger))
            return None
        state = ContinualState(ledger=ledger, **kept)
        object.__setattr__(module, _ATTRIBUTE, state)
    return state


class _Pending:
    """A ledger that waits beside a module for its first fit."""

    def __init__(self, ledger: NeuronLedger) -> None:
        self.ledger = ledger

    def __reduce__(self) -> Any:
        return dict, (_packed(self.ledger),)


def _pending(module: nn.Module) -> NeuronLedger | None:
    """The ledger that waits beside a module, if one does."""
    kept: _Pending | dict[str, Any] | None = getattr(module, _PENDING, None)
    if isinstance(kept, dict):
        kept = _Pending(NeuronLedger.from_state_dict(kept["ledger"]))
        object.__setattr__(module, _PENDING, kept)
    return None if kept is None else kept.ledger


def state_for(module: LightningModule, task: Task) -> ContinualState:
    """The state kept beside a module; made by tracing it on the task's data when there is none.

    Raises:
        StructureError: if the module cannot be traced.
        ContinualError: if the task has no data, or its batches give no input to trace with.
    """
    state = state_of(module)
    if state is None:
        example, forward = _way(module, task)
        ledger = _pending(module)
        isolation: Isolation = "exact" if ledger is None else ledger.isolation
        mixed = ""
        try:
            structure = _traced(module, task, example, forward, isolation=isolation)
        except StructureError as error:
            if ledger is not None:
                raise
            structure = _traced_apart(module, task, example, forward, error)
            ledger = NeuronLedger.for_structure(structure)
            ledger.isolation = "perturb"  # all that it can be; ``set_isolation`` says so where it is to be another
            mixed = str(error)
        ledger = ledger or NeuronLedger.for_structure(structure)
        if ledger.head != structure.head_layer:
            raise ContinualError(
                f"Task '{task.name}' leads to the output head '{structure.head_layer}', but the module's ledger knows"
                f" '{ledger.head}' as the first one. Where earlier tasks have heads of their own, make them known"
                " first: ContinualModule(module).add_task(task)."
            )
        state = ContinualState(structure, ledger, example, forward, mask_outputs=not mixed, mixed=mixed)
        object.__setattr__(module, _ATTRIBUTE, state)
    return state


def forget_state(module: nn.Module) -> None:
    """Takes the state off a module: its next task is its first."""
    module.__dict__.pop(_ATTRIBUTE, None)


def ledger_of(module: nn.Module) -> NeuronLedger | None:
    """The ledger kept beside a module, also one that was loaded before the module's first fit."""
    state = state_of(module)
    return _pending(module) if state is None else state.ledger


def keep_ledger(module: nn.Module, ledger: NeuronLedger) -> None:
    """Makes a ledger the module's own, such as one that ``NeuronLedger.from_checkpoint`` read.

    A network with norms that mix units needs it to compute what it computed when the checkpoint was written: under
    ``exact`` these norms go by owners (see ``normalisation.py``). Loading a ContinualModule does it by itself.
    """
    check_kind("keep_ledger", "module", module, nn.Module, "the network that the ledger is about")
    check_kind("keep_ledger", "ledger", ledger, NeuronLedger, "a NeuronLedger, such as from_checkpoint(path) reads")
    state = state_of(module)
    if state is None:
        object.__setattr__(module, _PENDING, _Pending(ledger))
    else:
        ledger.revision = state.ledger.revision + 1  # so that masks made for the other one are made anew
        state.ledger, state.last = ledger, None
    make_owner_aware(module, ledger.norm_owners())
