"""Whether a network, what was traced of it, and a ledger belong together; asked before anything is done with them."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_cf.errors import ContinualError, check_kind
from lightning_cf.network.forward import named_tensors
from lightning_cf.network.structure import Structure
from lightning_cf.ownership.fingerprints import differences
from lightning_cf.ownership.ledger import NeuronLedger


def check_parts(owner: str, module: Any, structure: Any, ledger: Any) -> None:
    """Refuses arguments in another order, and what was traced of another network.

    Args:
        owner: the function that got them, for the message.
        module: the network.
        structure: as ``trace`` found it.
        ledger: as ``new_ledger`` made it.

    Raises:
        ContinualError: names what does not fit.
    """
    check_kind(owner, "module", module, nn.Module, "the network")
    check_kind(owner, "structure", structure, Structure, "what trace(net, example) found")
    check_kind(owner, "ledger", ledger, NeuronLedger, "what new_ledger(units) made")
    ledger.owner_of_units(structure)  # refuses a ledger of another structure
    there = named_tensors(module)
    lost = [name for name in structure.entries if name not in there]
    if lost:
        raise ContinualError(
            f"{owner}: the structure knows '{lost[0]}', which {type(module).__name__} does not have. Give the network"
            " itself that was traced, not one that wraps it (DataParallel, torch.compile), or trace it again."
        )
    for name, uses in structure.entries.items():
        shape = there[name].shape
        if any(len(use.target.shape) != len(shape) or _too_long(use.target.shape, shape) for use in uses):
            raise ContinualError(
                f"{owner}: '{name}' has another shape, {list(shape)}, than when the network was traced. Trace it again."
            )


def check_weights(owner: str, module: nn.Module, ledger: NeuronLedger) -> None:
    """Refuses weights that are not those that sealed tasks own: they were trained or loaded without being held.

    Raises:
        ContinualError: names the task and the tensors.
    """
    sealed = {task.name for task in ledger.tasks if task.phase == "sealed"}
    found = next((d for d in differences(ledger, named_tensors(module)) if d.task in sealed), None)
    if found is not None:
        names = ", ".join(map(repr, found.tensors[:3])) + (" and others" if len(found.tensors) > 3 else "")
        raise ContinualError(
            f"{owner}: {names} of {type(module).__name__} are not what task '{found.task}' was sealed with: they were"
            " trained outside of 'with hold(...)', moved by a forward pass in train mode (call net.eval() to score), or"
            " loaded from elsewhere. Load the weights of its seal again."
        )


def _too_long(target: Any, shape: Any) -> bool:
    return any(size not in (1, full) for size, full in zip(target, shape, strict=True))
