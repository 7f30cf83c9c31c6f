"""What watches one fit: whether its losses, weights and what they give are finite, and the way back."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_cf.callbacks.label_watch import renumbered_in
from lightning_cf.errors import ContinualError, DivergenceError, DivergenceWarning, warn
from lightning_cf.exactness.overflow import overflow
from lightning_cf.learner.state import ContinualState
from lightning_cf.lightning_api import LightningModule, Trainer
from lightning_cf.network.finite import described, not_finite, watched
from lightning_cf.network.kept_entries import Snapshot
from lightning_cf.tasks.targets import finite

LOOK = 25
"""After how many batches a GPU, or other processes, are asked whether a loss was not finite."""


LOST = 100
"""How many losses in a row may be none while steps are skipped; a gradient scaler needs less than 20 to recover."""


NONE = torch.iinfo(torch.int64).max


@dataclass
class Seen:
    """A loss that is not finite.

    Attributes:
        total: number of its batch, counted over the fit.
        step: optimiser steps before it.
        epoch: number of its epoch.
        batch: its number in the epoch.
        loss: the loss, where it was seen at once.
        late: what of the weights was not finite already.
        gradients: what of the gradients is not finite; None where they were not looked at.
        input: whether the batch itself holds such numbers.
    """

    total: int
    step: int
    epoch: int
    batch: int
    loss: float | None = None
    late: str = ""
    gradients: list[str] | None = None
    input: bool = False

    @property
    def place(self) -> str:
        """Which step of the fit it was, in words for a message."""
        return f"step {self.step + 1} (global_step {self.step}, epoch {self.epoch}, batch {self.batch})"


class Watch:
    """What is known of one fit's numbers.

    Args:
        trainer: the fit's.
        module: the network.
        state: what is kept beside it; its ``safe`` is what a fit that diverges goes back to.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, state: ContinualState) -> None:
        self.trainer, self.module, self.state = trainer, module, state
        self.on_device = module.device.type != "cpu"
        self.at_once = trainer.world_size == 1 and not self.on_device
        self.first: Seen | None = None
        self.places: dict[int, Seen] = {}
        self.lost: Tensor | int = 0
        self.device_first: Tensor | None = None
        self.stuck = False
        state.safe = Snapshot.of(module)

    def see(self, loss: Any) -> None:
        """Takes note of a loss."""
        if not isinstance(loss, Tensor) or not loss.is_floating_point():
            return
        bad = ~loss.detach().isfinite().all()
        if not self.on_device:
            self.lost = int(self.lost) + 1 if bad else 0
            if bool(bad) and self.first is None:
                self.first = self._now()
                if self.at_once:
                    self.first.loss = float(loss.detach()) if loss.numel() == 1 else None
                    parameters = dict(self.module.named_parameters())
                    self.first.late = self._described({n: p for n, p in self._tensors().items() if n in parameters})
        else:
            none = torch.full((), NONE, device=bad.device)
            known = none if self.device_first is None else self.device_first
            self.device_first = torch.where(bad & (known == NONE), self.trainer.fit_loop.total_batch_idx, known)
            self.lost = torch.where(bad, self.lost + 1, 0)
        if not self.at_once:
            now = self._now()
            self.places.setdefault(now.total, now)

    def see_gradients(self) -> None:
        """Takes note of the gradients of a loss that is not finite, before anybody mends them."""
        if self.at_once and self.first is not None and self.first.gradients is None:
            found = {n: p.grad for n, p in self._tensors().items() if p.grad is not None}
            self.first.gradients = not_finite(found)

    def end_batch(self, outputs: Any, batch: Any) -> None:
        """Looks, where that is due.

        Raises:
            DivergenceError: if the fit diverged.
            ContinualError: after the first batch, if masked outputs make the loss infinite.
        """
        total = self.trainer.fit_loop.total_batch_idx
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if total == 0 and self.state.shown is not None and isinstance(loss, Tensor) and bool(loss.isinf().any()):
            raise ContinualError(
                f"masking: the loss of the first batch is infinite. {renumbered_in(self.trainer, batch)}While a task"
                " trains, the outputs of other tasks hold the lowest number: label smoothing, squared errors,"
                " penalties on logits cannot take it."
                " Use MaskedGradientCallback(mask_outputs=False), or a loss over the task's own outputs."
            )
        if not self.module.automatic_optimization:
            self.see(loss)  # its backward pass may have been hidden from us
        if self.first is not None and self.first.total == total and self.at_once:
            self.first.input = not finite(batch)
        due = self.first is not None if self.at_once else (total + 1) % LOOK == 0
        if due or self._stored_now():
            self.look()

    def look(self, *, everything: bool = False) -> None:
        """Looks at the weights where a loss was not finite, or whatever the losses were; on every process alike.

        Raises:
            DivergenceError: if the fit diverged.
        """
        first = self._agreed_first()
        if first is None and not everything:
            return
        names = not_finite(self._tensors())
        if self._any(bool(names)):
            raise DivergenceError(self._message(first, names))
        if first is not None and self.trainer.global_step > first.step:
            if first.gradients == [] and self.module.automatic_optimization and not self._scales():
                raise DivergenceError(self._message(first, []))
            self.first = self.device_first = None  # the step was skipped, or its gradients were mended
            self.places = {}
        if everything and not self._any(int(self.lost) < LOST):
            raise DivergenceError(
                f"{self._who()}: none of the last {int(self.lost)} losses is finite, and the steps were skipped."
                f" {_WAY_OUT}"
            )
        if everything and not self.stuck:
            self._look_at_optimizers()

    def look_at_outputs(self) -> None:
        """Looks whether the forward pass overflows; before a phase ends, on every process alike.

        Raises:
            DivergenceError: if it does though the weights are finite: earlier tasks would give no numbers either.
        """
        self.state.undisturb()
        assert self.state.safe is not None
        with nullcontext() if self.state.shown is None else self.state.shown.zeroed():
            layer = overflow(self.module, self.state.example, self.state.forward, self.state.safe)
        if self._any(bool(layer)):
            where = layer or "a layer on another process"
            raise DivergenceError(
                f"{self._who()} diverged {self._before_now()}: the weights are finite, but so large that {where}"
                f" overflows for training data. {_UNDONE} {_WAY_OUT}"
            )

    def _look_at_optimizers(self) -> None:
        """Warns, once a fit, of entries that do not train any more, since an optimiser overflowed."""
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        kept = {
            f"{names.get(id(parameter), 'a tensor')} ({key})": value
            for optimizer in self.trainer.optimizers
            for parameter, values in optimizer.state.items()
            for key, value in (values.items() if isinstance(values, dict) else ())
            if isinstance(value, Tensor)
        }
        if self.trainer.training and (found := not_finite(kept)):
            self.stuck = True
            warn(
                f"{self._who()}: the weights are finite, but what the optimiser keeps of them is not, first of"
                f" {found[0]}: a gradient was too large, and those entries train no more in this fit. {_WAY_OUT}",
                DivergenceWarning,
            )

    def put_back(self, exception: BaseException) -> None:
        """Makes the network what it was when the phase began, if some of its numbers are not finite."""
        self.state.undisturb()
        found = self._described(self._tensors())
        if self.state.safe is not None and (found or isinstance(exception, DivergenceError)):
            self.state.safe.put_back(self.module)
            if not isinstance(exception, DivergenceError):
                warn(
                    f"{self._who()}: the fit ended by {type(exception).__name__} when the network was not finite, first"
                    f" in {found}. It is again what it was when this phase began.",
                    DivergenceWarning,
                )
        self.state.safe = None

    def _tensors(self) -> dict[str, Tensor]:
        return watched(self.module, self.state.structure)

    def _described(self, tensors: Mapping[str, Tensor]) -> str:
        names = not_finite(tensors)
        return described(names, tensors) if names else ""

    def _now(self) -> Seen:
        trainer, loop = self.trainer, self.trainer.fit_loop
        return Seen(loop.total_batch_idx, trainer.global_step, trainer.current_epoch, loop.batch_idx)

    def _stored_now(self) -> bool:
        """Whether a checkpoint that asks no callback may be written at this batch's end."""
        step = self.trainer.global_step
        every = [getattr(c, "_every_n_train_steps", 0) for c in self.trainer.checkpoint_callbacks]
        return not self.at_once and any(n and step % n == 0 for n in every)

    def _scales(self) -> bool:
        return getattr(self.trainer.precision_plugin, "scaler", None) is not None

    def _agreed_first(self) -> Seen | None:
        """The first loss that was not finite, on any process."""
        total = NONE if self.first is None else self.first.total
        if self.device_first is not None:
            total = min(total, int(self.device_first))
        if self.trainer.world_size > 1:
            agreed = torch.tensor(total, device=self.module.device)
            torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MIN)
            total = int(agreed)
        if total == NONE:
            self.places = {}
            return None
        if self.first is None or self.first.total != total:
            self.first = self.places.get(total) or self._now()
        return self.first

    def _any(self, flag: bool) -> bool:
        if self.trainer.world_size == 1:
            return flag
        found: bool = self.trainer.strategy.reduce_boolean_decision(flag, all=False)
        return found

    def _who(self) -> str:
        tasks, current = self.state.ledger.tasks, self.state.ledger.current
        if current is None:
            return "Training"
        return f"Training of task '{tasks[-1].name}' ({current.phase})"

    def _message(self, first: Seen | None, names: list[str]) -> str:
        if first is None:
            where = self._before_now()
        elif first.late:
            where = f"at or before step {first.step}; the loss of {first.place} was the first that is not finite"
        else:
            where = f"at {first.place}"
        what = []
        if first is not None:
            what.append("the loss is not finite" if first.loss is None else f"the loss is {first.loss}")
            if first.input:
                what.append("its batch holds numbers that are not finite")
        if names:
            what.append(f"the network is not finite, first in {described(names, self._tensors())}")
        elif first is not None and first.gradients == []:
            what.append("weights and gradients are finite, the loss alone is not")
        else:
            what.append("the network is not finite on another process")
        return f"{self._who()} diverged {where}: {'; '.join(what)}. {_UNDONE} {_WAY_OUT}"

    def _before_now(self) -> str:
        """For messages: not later than now."""
        loop, steps = self.trainer.fit_loop, self.trainer.global_step
        seen = f"step {steps}" if steps else f"batch {loop.batch_idx}"  # a loop may step behind Lightning's back
        return f"at or before {seen} (epoch {self.trainer.current_epoch})"


_UNDONE = "Nothing was claimed or stored since; the network is again what it was when this phase began."


_WAY_OUT = (
    "Lower the learning rate, clip gradients (Trainer(gradient_clip_val=1.0)), or look at that batch and at the loss;"
    " Trainer(detect_anomaly=True) names the operation."
)
