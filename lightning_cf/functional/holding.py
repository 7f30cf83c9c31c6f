"""Only what the current task may move moves, in any training loop, with any optimiser."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from lightning_cf.errors import ContinualError, FrozenWarning, warn
from lightning_cf.exactness.memory import Memory
from lightning_cf.functional.belonging import check_parts, check_weights
from lightning_cf.network.forward import Forward, call, named_tensors
from lightning_cf.network.structure import Structure
from lightning_cf.ownership.freezing import Freezer
from lightning_cf.ownership.ledger import NeuronLedger
from lightning_cf.ownership.owner_aware_norms import make_owner_aware
from lightning_cf.ownership.sealed_entries import SealedEntries, cut_again, isolated
from lightning_cf.subspaces.bases import bases_to_train_in
from lightning_cf.subspaces.projection import Projection
from lightning_cf.subspaces.subspace import Subspace


class Hold:
    """While it lasts, entries that the current task may not move stay, bit for bit; see :func:`hold`.

    Args:
        module: the network.
        structure: as ``trace`` found it.
        ledger: says what may move in the current phase.
        subspace: what holds the weights that later tasks train.
        optimizers, example, forward: as in :func:`hold`.

    Attributes:
        structure: whoever traces the network anew puts the new one here, and calls :meth:`renew`.
        ledger: likewise.
    """

    def __init__(
        self,
        module: nn.Module,
        structure: Structure,
        ledger: NeuronLedger,
        *,
        subspace: Subspace | None = None,
        optimizers: Iterable[Optimizer] = (),
        example: Any = None,
        forward: Forward = call,
    ) -> None:
        self.example, self.forward = example, forward
        self._memory: Memory | None = None
        self.module, self.structure, self.ledger, self.subspace = module, structure, ledger, subspace
        self._optimizers = list(optimizers)
        self.frozen: dict[str, Tensor] = {}
        self._revision = -1
        self._freezer: Freezer | None = None
        self._projection: Projection | None = None
        self._sealed: SealedEntries | None = None
        self._held, self._written = dict[str, Tensor](), dict[str, None]()
        self._handle: RemovableHandle

    def keep(self) -> Hold:
        """Remembers what earlier tasks own, which :meth:`put_back` compares with in the end."""
        make_owner_aware(self.module, self.ledger.norm_owners())  # as sealed tasks were; nothing where it is so
        self._sealed = SealedEntries(self.module, self.structure, self.ledger)
        if self._sealed.entries and self.example is not None and isolated(self.ledger):
            self._memory = Memory(self.module, self.structure, self.ledger, self.example, self.forward)
        return self

    def renew(
        self,
        optimizers: Iterable[Optimizer] = (),
        *,
        undisturbed: AbstractContextManager[None] | None = None,
    ) -> None:
        """Holds from now on what may not move by the ledger as it is now.

        Args:
            optimizers: those whose steps a sub-space holds, and whose state is the freezer's to fill with zero where
                masks change. Others that step parameters of the module are met all the same.
            undisturbed: puts perturbed units back while frozen entries are remembered.
        """
        self.let_go()
        optimizers, tensors = list(optimizers), named_tensors(self.module)
        self._held = dict(self.module.named_parameters())
        # Before the freezer, whose hook then runs later and has the last word.
        bases = bases_to_train_in(self.structure, self.ledger, self.subspace, tensors)
        self._projection = Projection(tensors, bases).attach(optimizers)
        read = {n: t for n, t in tensors.items() if isinstance(t, nn.Parameter) or n in self.structure.entries}
        self.frozen = self.ledger.frozen(self.structure, read)
        with undisturbed or nullcontext():
            self._freezer = Freezer(self.module, self.frozen).attach(optimizers)
        self._revision = self.ledger.revision
        torch.compiler.reset()  # code that was compiled before does not see new hooks

    @property
    def current(self) -> bool:
        """Whether the ledger is what it was when :meth:`renew` was called last."""
        return self._revision == self.ledger.revision

    @property
    def freezer(self) -> Freezer:
        """What holds frozen entries now.

        Raises:
            ContinualError: if nothing is held.
        """
        if self._freezer is None:
            raise ContinualError("Nothing is held: use 'with hold(...)' around the training.")
        return self._freezer

    def restore(self) -> None:
        """Puts frozen entries back now, as after each step, where the ledger did not change under ``exact``."""
        if self._freezer is not None and self.current and self.ledger.exact:
            self._freezer.restore()

    def put_back(self) -> None:
        """Checks that what earlier tasks own is what it was, and what was cut zero; else puts it back, and warns."""
        moved = [] if self._sealed is None else self._sealed.put_back()
        moved = list(dict.fromkeys([*moved, *cut_again(self.module, self.structure, self.ledger)]))
        for name, by in self.structure.written.items():
            if name in moved:
                moved.remove(name)
                warn(
                    f"{by} writes '{name}' in the forward pass, which belongs to earlier tasks: it was put back.",
                    FrozenWarning,
                )
        if moved:
            warn(
                f"Something else than an optimiser's step changed entries of {', '.join(map(repr, moved))} that belong"
                " to earlier tasks, or are zero for good: they were put back. Look for what else writes weights: a"
                " hook, an average of weights (Lightning's are taken care of), a callback at the end of a fit.",
                FrozenWarning,
            )
        if names := ", ".join(repr(name) for name in self._written if name not in self.structure.written):
            warn(
                f"Training writes {names}, with which earlier tasks compute: after each step they were put back. Let a"
                " task write what only it computes with, such as a buffer of its own.",
                FrozenWarning,
            )
        self._written = {}
        self.look_back()

    def look_back(self) -> None:
        """Warns where earlier tasks' units give something else for the example than in the beginning.

        Where that is so since something else stands in buffers' places, these are put back.
        """
        lost = "" if self._memory is None else self._memory.lost()
        if not lost or self._memory is None:
            return
        if names := self._memory.bring_back():
            warn(
                f"In the place of {', '.join(map(repr, names))} training put something else, with which earlier tasks"
                " compute: it was put back in the end. Let a task write what only it computes with, such as a buffer"
                " of its own.",
                FrozenWarning,
            )
        else:
            self._memory = None  # said once
            warn(
                f"Now {lost} give something else than before this task was trained,"
                f" though their weights are what they were. Something else that {type(self.module).__name__} computes"
                " with has changed: an attribute that is no parameter and no buffer, a layer or a buffer that is new or"
                " of another shape, or that is not registered. Register it whole (register_buffer, nn.ModuleList)"
                " before the first task, so that it is held.",
                FrozenWarning,
            )

    def give_up(self) -> None:
        """Lets go after an exception, which may have come in the middle of a step: all is as it was, unchecked."""
        try:
            self.restore()
            if self._sealed is not None:
                self._sealed.put_back()
            if self._memory is not None:
                with suppress(Exception):  # whatever a forward pass raises: there is an exception already
                    self._memory.bring_back()
        finally:
            self._sealed = None
            self.let_go()

    def let_go(self) -> None:
        """Removes every hook; nothing is held from now on, and nothing is put back."""
        if self._freezer is not None:
            torch.compiler.reset()
            self._written |= self._freezer.written
        for holder in (self._projection, self._freezer):
            if holder is not None:
                holder.detach()
        self._projection = self._freezer = None

    def __enter__(self) -> Hold:
        if self._freezer is not None:
            raise ContinualError("hold: this one holds already; make another by hold(...).")
        check_parts("hold", self.module, self.structure, self.ledger)
        if self.ledger.current is None:
            raise ContinualError("hold: no task is being learned; ledger.begin(name, outputs=[...]) starts one.")
        check_weights("hold", self.module, self.ledger)
        self.keep()
        self.renew(self._optimizers)
        self._handle = register_optimizer_step_pre_hook(self._before_step)
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self._handle.remove()
        if kind is not None:
            self.give_up()
            return
        self.let_go()
        self.put_back()
        self._check_same(dict(self.module.named_parameters()))

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        now = dict(self.module.named_parameters())
        own = {id(parameter) for parameter in now.values()}
        stepped = (parameter for group in optimizer.param_groups for parameter in group["params"])
        if not any(id(parameter) in own for parameter in stepped):
            return
        if not self.current:
            raise ContinualError(
                "The ledger changed while entries were held by what it said before. Claim, seal and begin tasks outside"
                " of 'with hold(...)', or call its renew() after them."
            )
        self._check_same(now)

    def _check_same(self, now: Mapping[str, Tensor]) -> None:
        """Raises ContinualError where others stand in the place of the parameters that are held."""
        other = next((name for name in {**self._held, **now} if now.get(name) is not self._held.get(name)), None)
        if other is not None:
            raise ContinualError(
                f"'{other}' was replaced while it was held (load_state_dict(assign=True), pruning, a parametrisation):"
                " what stands there now is not held. Do that outside of 'with hold(...)', and trace the network again."
            )


def hold(
    module: nn.Module,
    structure: Structure,
    ledger: NeuronLedger,
    *,
    subspace: Subspace | None = None,
    optimizers: Iterable[Optimizer] = (),
    example: Any = None,
    forward: Forward = call,
) -> Hold:
    """A context in which only what the current task may move moves, whatever loop and optimiser train meanwhile.

    In LEARN, before the task's claim, what computes free units and the task's outputs moves; in INVARIANCE, after it,
    what computes the claimed units and the task's outputs. Gradients of everything else are zero before an optimiser
    or a clip sees them, and its values are put back after each step, bit for bit; optimisers may be made before or
    within the context.

    >>> import torch
    >>> from lightning_cf import functional as cf
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> units = cf.trace(net, torch.randn(4, 2))
    >>> ledger = cf.new_ledger(units)
    >>> task = ledger.begin("a", outputs=[0])
    >>> before = net[2].weight.detach().clone()
    >>> with cf.hold(net, units, ledger):
    ...     optimizer = torch.optim.SGD(net.parameters(), lr=1.0, weight_decay=0.5)
    ...     net(torch.randn(4, 2)).sum().backward()
    ...     _ = optimizer.step()
    >>> (net[2].weight == before).all(dim=1).tolist()  # the second output is no task's yet
    [False, True]

    Args:
        module: the network.
        structure: as :func:`~lightning_cf.functional.trace` found it.
        ledger: says what may move.
        subspace: what holds the weights that later tasks train (US 12387107, paragraph 24).
        optimizers: those that train, where a subspace is given; other entries are held under any.
        example: an input; what earlier tasks' units give for it is compared before and after.
        forward: how to run the network on it.

    Raises:
        ContinualError: for a subspace without optimisers.

    Warns:
        FrozenWarning: in the end, if something else than an optimiser's step moved what earlier tasks own, or what
            their units give for the example.
    """
    optimizers = list(optimizers)
    if subspace is not None and not optimizers:
        raise ContinualError("hold: a subspace holds the steps of optimisers; give it optimizers=[...] too.")
    return Hold(module, structure, ledger, subspace=subspace, optimizers=optimizers, example=example, forward=forward)
