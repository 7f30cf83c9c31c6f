"""Weights and ledger belong together, whatever a Trainer loads: looked at where a fit starts and an evaluation ends."""

from __future__ import annotations

from typing import Any

import torch

from lightning_cf.errors import ContinualError, LedgerWarning, warn
from lightning_cf.exactness.memory import Memory
from lightning_cf.learner.keeping import keep_ledger, ledger_of, state_of
from lightning_cf.lightning_api import LightningModule
from lightning_cf.network.forward import named_tensors
from lightning_cf.network.kept_entries import Snapshot
from lightning_cf.network.output_heads import fit_head
from lightning_cf.network.structure import Structure
from lightning_cf.ownership.fingerprints import Difference, differences
from lightning_cf.ownership.ledger import NeuronLedger
from lightning_cf.ownership.traces import rows_cut_off
from lightning_cf.utilities.randomness import isolated_generators

_WAY_OUT = "Weights and ledger belong together: load both from the same checkpoint, the last one of the task before."

_OF_BUFFERS = (
    "Earlier tasks compute with them, so they stay as the first task left them: let what writes them between fits, such"
    " as setup() that takes statistics of the data, do so before the first task only."
)

OTHER = 0.5
"""Values that lie further than this share of their size from what a ledger knows are of other weights."""


class LoadGuard:
    """Keeps what a module holds before a Trainer loads a checkpoint into it, until it is known whether that stays.

    Args:
        module: with a ledger that knows tasks.
        ledger: that ledger.
    """

    def __init__(self, module: LightningModule, ledger: NeuronLedger) -> None:
        self.module, self.ledger = module, ledger
        self.before: Snapshot | None = None
        self._handle = module.register_load_state_dict_pre_hook(_Keeper(self))  # type: ignore[no-untyped-call]

    def release(self) -> None:
        """Takes the hook off the module and forgets what it kept."""
        self._handle.remove()
        self.before = None

    def undone(self) -> str:
        """Says what a checkpoint that was loaded took back; empty where it took nothing back."""
        if self.before is None:
            return ""
        now = ledger_of(self.module)
        assert now is not None
        if now is not self.ledger:
            lost = self.ledger.undone_by(now)
            known = {task.name: task.phase for task in now.tasks}
            return " and ".join(
                f"task '{name}' as it was before its {'seal' if known[name] == 'invariance' else 'partition'}"
                if name in known
                else f"nothing of task '{name}'"
                for name in lost
            )
        other = differences(now, named_tensors(self.module))
        return f"no ledger, and not the weights that task '{other[0].task}' left" if other else ""

    @torch.no_grad()
    def put_back(self) -> None:
        """Gives the module the weights and the ledger that it had."""
        assert self.before is not None
        keep_ledger(self.module, self.ledger)
        for layer, columns in self.ledger.heads.items():
            head: Any = self.module.get_submodule(layer)
            if len(head.weight) != len(columns):
                with isolated_generators():
                    fit_head(head, len(columns))
        self.before.put_back(self.module)


class _Keeper:
    """The hook; it does not travel with copies of the module."""

    def __init__(self, guard: LoadGuard | None = None) -> None:
        self.guard = guard

    def __call__(self, *args: Any) -> None:
        if self.guard is not None and self.guard.before is None:
            self.guard.before = Snapshot.of(self.guard.module)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_Keeper, ())


def check_resumed(guard: LoadGuard | None, path: object, task: str) -> None:
    """Refuses to start a task from a checkpoint that takes back other tasks; the module is put back first.

    The task itself may be taken up where the checkpoint left it.

    Raises:
        ContinualError: for such a checkpoint.
    """
    if guard is None or guard.before is None:
        return
    now = ledger_of(guard.module)
    assert now is not None
    lost = [name for name in guard.ledger.undone_by(now) if name != task or not now.knows(task)]
    if now is not guard.ledger and lost:
        what = guard.undone()
        guard.put_back()
        raise ContinualError(
            f"ckpt_path={str(path)!r} holds {what}, which the module has learned since: a fit of task '{task}' that"
            f" goes on from it would lose {' and '.join(map(repr, lost))}. The module is as it was. Fit without"
            " ckpt_path, or load the checkpoint into a module of its own."
        )


def end_evaluation(guard: LoadGuard, path: object) -> None:
    """Puts the module back where an evaluation loaded a checkpoint that is older than what the module has learned."""
    what = guard.undone()
    if what:
        guard.put_back()
        warn(
            f"ckpt_path={str(path)!r} holds {what}. It was evaluated; the module then got back the weights and the"
            " ledger that it had before, so that later tasks start from all that was learned. To go on from the"
            " checkpoint, load"
            " it into a module of its own.",
            LedgerWarning,
        )


def check_weights(module: LightningModule, ledger: NeuronLedger, guard: LoadGuard | None, path: object) -> None:
    """Checks that the weights a fit starts from are those that the ledger was made for.

    Raises:
        ContinualError: if they are not: entries that were zero for good are not, or most is far from what it was.
    """
    loaded = guard is not None and guard.before is not None
    tensors = named_tensors(module)
    last = None if (state := state_of(module)) is None or loaded else state.last
    if last is not None and last.here:  # it was learned in this process, which knows better than samples of values do
        _check_last(module, last)
        tensors = {name: x for name, x in tensors.items() if name not in last.loose}
    found = differences(ledger, tensors)
    if not found:
        return
    source = f" of {ledger.origin}" if ledger.origin else ""
    worst = max(found, key=lambda difference: (_severe(difference, ledger), difference.distance))
    names = ", ".join(map(repr, worst.tensors[:3])) + (" and others" if len(worst.tensors) > 3 else "")
    if _severe(worst, ledger):
        if guard is not None and loaded:
            guard.put_back()
        where = f"ckpt_path={str(path)!r} holds weights that are not" if loaded else "The weights are not"
        raise ContinualError(
            f"{where} those that the ledger{source} was made for: {names} differ from what task '{worst.task}' left."
            f" {_WAY_OUT if loaded or set(worst.tensors) & {*dict(module.named_parameters())} else _OF_BUFFERS}"
        )
    warn(
        f"Since the last fit something changed weights that task '{worst.task}' owns, by {worst.distance:.1%} of their"
        f" size: {names}. What was learned before may have changed with them; look for what writes weights outside a"
        " fit, or for a"
        " checkpoint that is not the one of the ledger.",
        LedgerWarning,
    )


def _check_last(module: LightningModule, last: Memory) -> None:
    """Refuses tensors that are part of no unit and were changed since the last fit, where earlier tasks read them.

    Raises:
        ContinualError: for such tensors; where something else is the cause, it warns.
    """
    changed, state = last.changed(), state_of(module)
    grew = state is None or state.structure.head.size != last.structure.head.size
    lost = last.lost(exactly=bool(changed), outputs=not grew)
    if lost and changed:
        names = ", ".join(map(repr, changed))
        raise ContinualError(
            f"{names} of {type(module).__name__} changed since the last fit, so that {lost} give something else."
            f" {_OF_BUFFERS}"
        )
    if lost:
        warn(
            f"Since the last fit {lost} give something else, though weights and"
            f" buffers are what they were: something else that {type(module).__name__} computes with has changed.",
            LedgerWarning,
        )


def _severe(difference: Difference, ledger: NeuronLedger) -> bool:
    return (difference.connected and ledger.exact) or difference.distance > OTHER


def warn_of_traces(module: LightningModule, structure: Structure) -> None:
    """Warns of weights that look as if tasks had been learned with them, where the module has no ledger."""
    found = rows_cut_off(structure, named_tensors(module))
    if found:
        name, rows = found
        warn(
            f"Tasks seem to have been learned here before: {rows} rows of '{name}' are cut off from units that its"
            f" other rows read. But {type(module).__name__} has no ledger, so nothing protects them. Give it the one"
            " that its checkpoint holds: PartitionCallback(ledger=PATH), or keep_ledger(module,"
            " NeuronLedger.from_checkpoint(PATH)).",
            LedgerWarning,
        )
