"""The heads of the current task, in training: their loss joins the module's own at the last layer's output."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim.lr_scheduler import LambdaLR

from lightning_cf.learner.labels import positions_of
from lightning_cf.lightning_api import LightningModule, Trainer
from lightning_cf.network.forward import eval_mode, fresh
from lightning_cf.network.output_heads import column_axis
from lightning_cf.network.structure import layer_of
from lightning_cf.task_inference import Readout, Sites, View, read
from lightning_cf.task_inference.trained import Trained
from lightning_cf.task_inference.variants import VARIANTS, differs, strange
from lightning_cf.tasks.task import Task
from lightning_cf.utilities.hooks import Hook
from lightning_cf.utilities.randomness import isolated_generators, keyed_generator


class Heads:
    """What trains beside a task's units: added to the loss by the last layer's output.

    Args:
        module: the network.
        task: the current one.
        sites: where the heads look.
        strategies: one for each head.
        values: by head, what it starts with.
        lr: learning rate of their own optimiser, which falls along a cosine.
        steps: how many it is to take.
    """

    def __init__(
        self,
        module: LightningModule,
        task: Task,
        sites: Sites,
        strategies: Sequence[Trained],
        values: dict[str, dict[str, Tensor]],
        lr: float,
        steps: int,
    ) -> None:
        self.module, self.task, self.sites, self.strategies = module, task, sites, list(strategies)
        self.fixed: dict[str, dict[str, Tensor]] = {}
        self.trained: dict[str, dict[str, nn.Parameter]] = {}
        for strategy in self.strategies:
            given = {n: v.detach().clone().to(module.device) for n, v in values[strategy.head].items()}
            self.fixed[strategy.head] = {n: v for n, v in given.items() if n in strategy.fixed}
            self.trained[strategy.head] = {n: nn.Parameter(v) for n, v in given.items() if n not in strategy.fixed}
        self.parameters = [p for trained in self.trained.values() for p in trained.values()]
        self.optimizer = torch.optim.Adam(self.parameters, lr=lr)
        warm = max(1, min(50, steps // 20))
        self.schedule = LambdaLR(
            self.optimizer, lambda i: min((i + 1) / warm, 0.5 * (1 + math.cos(math.pi * min(i, steps) / steps)) + 1e-3)
        )
        self.revision, self.stepped = -1, 0
        self.batch: tuple[Any, Any] | None = None
        self.key: tuple[int | str, ...] = ()
        self.generator: torch.Generator | None = None
        self._scale, self._unscale = 0.0, 1.0
        self.loss: Tensor | None = None
        self.attached: set[str] = set()
        self.place: str | None = None
        self.inside = False
        self.seen: dict[str, Tensor] = {}
        self.changes = list(dict.fromkeys(change for strategy in self.strategies for change in strategy.changes))
        self.hooks = ExitStack()
        self.watched: set[str] = set()
        if any(not strategy.changes for strategy in self.strategies):
            self.watched = {sites.inputs or "", *(site.weight for site in sites.hidden[: len(sites.chain)])}
        for name in self.watched:
            layer = module.get_submodule(layer_of(name))
            self.hooks.callback(
                layer.register_forward_pre_hook(Hook(partial(self._see, name)), with_kwargs=True).remove
            )
        for path in sites.heads:
            hook = module.get_submodule(path).register_forward_hook(Hook(partial(self._attach, path)))
            self.hooks.callback(hook.remove)

    def begin_batch(self, batch: Any, key: tuple[int | str, ...]) -> None:
        """A batch comes, into which the training step may write; what is drawn for it depends on the key."""
        pair = isinstance(batch, (tuple, list)) and len(batch) == 2
        self.batch = fresh((batch[0] if self.changes else None, batch[1])) if pair else None
        self.key, self.generator, self.place, self.loss = key, None, None, None

    def weigh(self, scale: float, unscale: float) -> None:
        """By what the loss is multiplied where it joins, and by what its gradients are divided before a step."""
        self._scale, self._unscale = scale, unscale

    def end_batch(self) -> None:
        """Until the next one, no forward pass is over a batch."""
        self.batch = None

    def idle(self) -> list[str]:
        """Heads that were never trained."""
        return [strategy.head for strategy in self.strategies if strategy.head not in self.attached]

    def values(self) -> dict[str, dict[str, Tensor]]:
        """By head, what is trained and what goes with it."""
        return {
            head: {**{name: p.detach().clone() for name, p in trained.items()}, **self.fixed[head]}
            for head, trained in self.trained.items()
        }

    def step(self, trainer: Trainer) -> None:
        """A step of the heads' own optimiser, on gradients averaged over processes."""
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad /= self._unscale
                if trainer.world_size > 1:
                    parameter.grad = trainer.strategy.reduce(parameter.grad, reduce_op="mean")
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if gradients and all(bool(gradient.isfinite().all()) for gradient in gradients):
            self.optimizer.step()
            self.schedule.step()
        self.optimizer.zero_grad()

    def _see(self, name: str, layer: nn.Module, inputs: Any, named: Any) -> None:
        if self.batch is not None and not self.inside and torch.is_grad_enabled():
            x = inputs[0] if inputs else named["input"]
            self.seen[name] = x.movedim(column_axis(layer, x), -1)

    def _attach(self, path: str, layer: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        if self.inside:
            return None
        seen, self.seen = self.seen, {}
        if not torch.is_grad_enabled() or self.batch is None or self.place not in (None, path):
            return None
        x, target = self.batch
        labels = positions_of(self.task.classes or [], target, len(output))
        if labels is None:
            return None
        views: dict[bool, View] = {}
        if self.watched and self.watched <= seen.keys():
            views[False] = self._seen(seen, output)
        if self.changes and isinstance(x, Tensor) and len(x) == len(labels):
            views[True] = self._changed(x, target)
        losses = []
        with torch.autocast(output.device.type, enabled=False):
            for strategy in self.strategies:
                view = views.get(bool(strategy.changes))
                if view is not None:
                    values = {**self.trained[strategy.head], **self.fixed[strategy.head]}
                    losses.append(strategy.share * strategy.loss(values, view, labels))
                    self.attached.add(strategy.head)
        if not losses:
            return None
        self.place, self.loss = path, sum(losses).detach()  # type: ignore[union-attr]
        attached: Tensor = _Attached.apply(output, sum(losses), self)  # type: ignore[no-untyped-call]
        return attached

    def _seen(self, seen: dict[str, Tensor], output: Tensor) -> View:
        """The view of the module's own forward pass, as far as heads without changes look."""
        with torch.autocast(output.device.type, enabled=False):
            readout = Readout(
                seen[self.sites.inputs or ""].float().reshape(len(output), -1),
                {n: x.float().reshape(len(output), -1, x.shape[-1]).mean(1) for n, x in seen.items()},
                output.new_zeros(len(output), int(self.sites.outputs.max()) + 1, dtype=torch.float32),
                dict(self.module.named_parameters()),
            )
            chain = self.sites.hidden[: len(self.sites.chain)]
            return View.of(readout, replace(self.sites, hidden=chain))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _changed(self, x: Tensor, target: Tensor) -> View:
        """The view of a further forward pass over the batch and all that is made of it."""
        self.generator = self.generator or keyed_generator(*self.key)
        inputs = [x]
        for name in self.changes:
            inputs.append(strange(x, self.generator) if name == "strange" else VARIANTS[name](x))
        batch = torch.cat(inputs), torch.cat([target] * len(inputs))
        self.inside = True
        try:
            with aside(self.module):
                readout = read(
                    self.module, [self.sites], partial(self.task.evaluate, self.module, batch), keep_graph=True
                )
        finally:
            self.inside = False
        whole = View.of(readout, replace(self.sites, chain=()))
        parts = [whole.part(slice(start, start + len(x))) for start in range(0, len(batch[0]), len(x))]
        others = dict(zip(self.changes, parts[1:], strict=True))
        if "strange" in others:
            others["strange"] = others["strange"].part(differs(x, inputs[1 + self.changes.index("strange")]))
        return replace(parts[0], others=others)


@contextmanager
def aside(module: nn.Module) -> Iterator[None]:
    """Further forward passes that leave no trace: in eval mode, on copies of the buffers, generators as they were.

    So norms use their running statistics and nothing is dropped, as at test time.
    """
    with ExitStack() as stack:
        stack.enter_context(eval_mode(module))
        stack.enter_context(isolated_generators())
        for child in module.modules():
            if isinstance(child, nn.RNNBase):
                child.train()  # cuDNN has no backward pass in eval mode
            for name, buffer in list(child._buffers.items()):
                if buffer is not None and not is_lazy(buffer):
                    stack.callback(child._buffers.__setitem__, name, buffer)
                    child._buffers[name] = buffer.detach().clone()
        yield


class _Attached(torch.autograd.Function):
    """Gives its input on, and a gradient of its own to a loss: so a loss joins another one in any loop."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, loss: Tensor, owner: Heads) -> Tensor:
        """Gives its input back: the hooks on it do the work."""
        ctx.owner, ctx.dtype = owner, loss.dtype
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """The gradient, and the scale of the loss that joined."""
        (gradient,) = gradients
        return gradient, torch.tensor(ctx.owner._scale, dtype=ctx.dtype, device=gradient.device), None
