"""Which way the redundant units' gradients pointed in recent steps (US 12387107, paragraph 21)."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from itertools import accumulate

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_cf.network.forward import named_tensors
from lightning_cf.network.structure import Rows, UnitGroup
from lightning_cf.subspaces.subspace import LearnedSubspace, count_of, exact_dtype
from lightning_cf.utilities.randomness import keyed_generator


class DirectionLearner:
    """Remembers gradients of some units by a few random combinations a step, and finds their leading directions.

    A step's gradient matrix G (units x inputs) is kept as S G with a random normal S of few rows, whose second moment
    is that of G in expectation; so the singular vectors of what is kept approach those of all gradients.

    Args:
        subspace: how many directions, over how many steps.
        units: for each group by name, the units (numbered within it) whose gradients count.
    """

    def __init__(self, subspace: LearnedSubspace, units: Mapping[str, Int64[Tensor, "_"]]) -> None:
        self.subspace = subspace
        self.units = dict(units)
        self.step = 0
        self.losses: list[Tensor] = []
        self.best = math.inf
        self._blocks: dict[str, deque[Float[Tensor, "rows inputs"]]] = {}
        self._now: dict[str, Float[Tensor, "rows inputs"]] = {}
        self._handles: list[RemovableHandle] = []

    def attach(self, module: nn.Module, groups: tuple[UnitGroup, ...]) -> DirectionLearner:
        """Watches the gradients of the groups' weights, before anything masks or accumulates them."""
        tensors = named_tensors(module)
        for group in groups:
            weights = [rows for rows in group.rows if rows.role == "weight"]
            ends = list(accumulate(rows.width(tensors[rows.tensor]) for rows in weights))
            kept = max(4, math.ceil(2 * count_of(self.subspace.dimensions, ends[-1]) / self.subspace.steps))
            for rows, start, end in zip(weights, [0, *ends], ends, strict=False):
                if tensors[rows.tensor].requires_grad:
                    watch = _Watch(self, group.name, rows, slice(start, end), (kept, ends[-1]))
                    self._handles.append(tensors[rows.tensor].register_hook(watch))
        return self

    def detach(self) -> None:
        """Removes the hooks from the gradients; what was learned so far stays."""
        while self._handles:
            self._handles.pop().remove()

    def observe(self, group: str, rows: Rows, gradient: Tensor, place: slice, shape: tuple[int, int]) -> None:
        """Takes in the gradient of one tensor of a group.

        Args:
            group: the group's name.
            rows: where its units sit in the tensor.
            gradient: of the tensor.
            place: where the tensor's entries stand in a weight vector of the group.
            shape: of what is kept of the group's gradients a step; tensors without a gradient count as zero.
        """
        units = self.units[group].to(gradient.device)
        if len(units) == 0:
            return
        exact = exact_dtype(gradient.device)
        generator = keyed_generator(self.subspace.seed, "sketch", group, self.step)
        sketch = torch.randn(shape[0], len(units), generator=generator, dtype=torch.float32)
        seen = sketch.to(gradient.device, exact) @ rows.read(gradient.detach().contiguous())[units].to(exact)
        now = self._now.setdefault(group, seen.new_zeros(shape))
        now[:, place] += seen.to(now.device)

    def end_step(self, loss: Tensor | None) -> None:
        """Closes a training batch; leaves out a group's gradients where one of them is not finite."""
        for group, now in self._now.items():
            seen = now.float().cpu()
            if bool(torch.isfinite(seen).all()):
                self._blocks.setdefault(group, deque(maxlen=self.subspace.steps)).append(seen)
        self._now = {}
        self.step += 1
        if loss is not None:
            self.losses.append(loss.detach().float().mean())

    def loss_fell(self) -> bool:
        """Whether the mean loss since the last call is the lowest so far; also where no loss is known."""
        if not self.losses:
            return True
        mean = float(torch.stack(self.losses).mean())
        self.losses = []
        fell = mean < self.best
        if fell:
            self.best = mean
        return fell

    def directions(self, groups: tuple[UnitGroup, ...]) -> dict[str, Float[Tensor, "_ _"]]:
        """For each group an orthonormal basis of the leading directions; none for a group without gradients."""
        found = {}
        for group in groups:
            if group.name not in self._blocks:
                continue
            gradients = torch.cat(list(self._blocks[group.name])).double()
            _, s, vh = torch.linalg.svd(gradients, full_matrices=False)
            rank = int((s > 1e-6 * s[0]).sum()) if float(s[0]) > 0 else 0
            if rank:
                wanted = count_of(self.subspace.dimensions, gradients.shape[1])
                found[group.name] = vh[: min(rank, wanted)].T.float().contiguous()
        return found


class _Watch:
    """A gradient hook of one tensor."""

    def __init__(self, learner: DirectionLearner, group: str, rows: Rows, place: slice, shape: tuple[int, int]) -> None:
        self.learner, self.group, self.rows, self.place, self.shape = learner, group, rows, place, shape

    def __call__(self, gradient: Tensor) -> None:
        self.learner.observe(self.group, self.rows, gradient, self.place, self.shape)
