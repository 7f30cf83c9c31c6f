"""Avalanche's methods on its own templates; batches of images are changed as tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from avalanche.benchmarks import benchmark_from_datasets, with_classes_timeline, with_task_labels
from avalanche.benchmarks.utils import _make_taskaware_tensor_classification_dataset
from avalanche.core import SupervisedPlugin
from avalanche.models import MultiHeadClassifier, MultiTaskModule, SimpleMLP
from avalanche.models.packnet import PackNetModel
from avalanche.training.plugins import SynapticIntelligencePlugin
from avalanche.training.supervised import DER, EWC, LwF, Naive, PackNet, StreamingLDA, SynapticIntelligence
from avalanche.training.utils import cycle
from protocol import BATCH, CLASSES, HIDDEN, Job
from torch import Tensor, nn

from lightning_cf.data import RandomAffine, TensorImages

STRATEGIES = {"ewc": EWC, "si": SynapticIntelligence, "lwf": LwF, "der": DER}


class Batches(SupervisedPlugin):
    """Gives a strategy its batches as whole tensors, changed by the augmentation, and those from memory too.

    Args:
        tasks: images to train on.
        told: whether a task has a name and classes 0 and 1.
        size: of a batch.
        rest: whether a last batch that is not full is kept.
    """

    def __init__(self, tasks: list[TensorImages], *, told: bool, size: int = BATCH, rest: bool = False) -> None:
        super().__init__()
        self.tasks, self.told, self.size, self.rest, self.affine = tasks, told, size, rest, RandomAffine()

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        task = strategy.experience.current_experience
        data = self.tasks[task]
        names = torch.full_like(data.labels, task * self.told)
        strategy.dataloader = _Loader([data.images, data.labels - CLASSES[task][0] * self.told, names], self)
        if getattr(strategy, "replay_loader", None) is not None:
            columns = zip(*strategy.storage_policy.buffer, strict=True)
            strategy.replay_loader = cycle(_Loader([torch.stack([*map(torch.as_tensor, c)]) for c in columns], self))


class _Loader:
    """Shuffled batches."""

    def __init__(self, columns: list[Tensor], plan: Batches) -> None:
        self.columns, self.plan = columns, plan

    def __iter__(self) -> Iterator[list[Tensor]]:
        for chosen in torch.randperm(len(self.columns[0])).split(self.plan.size):
            if self.plan.rest or len(chosen) == self.plan.size:
                images, *rest = (column[chosen] for column in self.columns)
                yield [self.plan.affine(images), *rest]


class HeadPerTask(MultiTaskModule):
    """Avalanche's MLP with its head for each task."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Flatten(), _mlp(2).features)
        self.classifier = MultiHeadClassifier(HIDDEN)

    def forward(self, images: Tensor, task_labels: Any) -> Tensor:
        return self.classifier(self.features(images), task_labels)


class AvalanchePeer:
    """One strategy on its benchmark."""

    def __init__(self, job: Job, strategy: Any, experiences: list[Any]) -> None:
        self.job, self.strategy, self.experiences = job, strategy, experiences

    def learn(self, task: int) -> None:
        self.strategy.train(self.experiences[task])

    def told(self, images: Tensor, task: int) -> Tensor:
        if self.job.scenario == "class":
            return self.untold(images)[:, list(CLASSES[task])]
        model = self.strategy.model.eval()
        return model(images, torch.full((len(images),), task))[:, :2]

    def untold(self, images: Tensor) -> Tensor | None:
        if self.job.scenario == "task":
            return None
        found = self.strategy.model.eval()(images)
        return self.strategy.predict(found) if isinstance(self.strategy, StreamingLDA) else found

    def kept(self) -> int:
        return sum(part.numel() for part in _kept(self.job.method, self.strategy))


def make(job: Job, tasks: list[TensorImages]) -> AvalanchePeer:
    """The peer of a job."""
    experiences = _experiences(tasks, told=job.scenario == "task")
    if job.method == "slda":
        strategy = _slda(job, tasks, experiences[0])
    elif job.method == "packnet":
        strategy = _packnet(job, tasks)
    else:
        if job.method == "si":
            SynapticIntelligencePlugin.extract_weights = staticmethod(_extract_weights)
        model = HeadPerTask() if job.scenario == "task" else _mlp(10)
        strategy = STRATEGIES[job.method](**_common(job, model, tasks), **job.options)
    return AvalanchePeer(job, strategy, experiences)


def _experiences(tasks: list[TensorImages], *, told: bool) -> list[Any]:
    """With the name of the task and classes 0 and 1 in each, or with nothing but all ten classes."""
    datasets = [
        _make_taskaware_tensor_classification_dataset(
            data.images, data.labels - CLASSES[task][0] * told, task_labels=task * told
        )
        for task, data in enumerate(tasks)
    ]
    benchmark = with_classes_timeline(with_task_labels(benchmark_from_datasets(train=datasets)))
    experiences = list(benchmark.streams["train"])
    for experience in experiences:  # the library's own heads index with a list what its benchmark gives as a set
        experience.classes_in_this_experience = sorted(experience.classes_in_this_experience)
    return experiences


def _mlp(classes: int) -> SimpleMLP:
    return SimpleMLP(num_classes=classes, hidden_size=HIDDEN, hidden_layers=2, drop_rate=0.0)


def _common(job: Job, model: nn.Module, tasks: list[TensorImages]) -> dict[str, Any]:
    return {
        "model": model,
        "optimizer": job.make_optimizer(model.parameters()),
        "criterion": nn.CrossEntropyLoss(),
        "train_mb_size": BATCH,
        "train_epochs": job.epochs,
        "plugins": [Batches(tasks, told=job.scenario == "task")],
        "evaluator": None,
    }


def _packnet(job: Job, tasks: list[TensorImages]) -> PackNet:
    """Prunes after seven tenths of the epochs; "equal" leaves every task the same share of the weights."""
    share: float | list[float] = job.options["prune_proportion"]
    if job.options["prune_proportion"] == "equal":
        share = [1 - 1 / (len(tasks) - task) for task in range(len(tasks))]
    after = max(1, round(0.3 * job.epochs))
    strategy = PackNet(**_common(job, PackNetModel(_mlp(2)), tasks), prune_proportion=share, post_prune_epochs=after)
    # It nests the list of plugins that it is given, which then are not called: images would not be changed as others'.
    nested = [plugin if isinstance(plugin, list) else [plugin] for plugin in strategy.plugins]
    strategy.plugins = [plugin for plugins in nested for plugin in plugins]
    return strategy


def _slda(job: Job, tasks: list[TensorImages], first: Any) -> StreamingLDA:
    """Over the pixels, or over the features of a network that learned the first task; one pass over each task."""
    options = dict(job.options)
    features, size = nn.Flatten(), 784
    if options.pop("features") == "network":
        network = _mlp(10)
        Naive(**_common(job, network, tasks)).train(first)
        features, size = nn.Sequential(features, network.features), HIDDEN
    return StreamingLDA(
        slda_model=features,
        criterion=nn.CrossEntropyLoss(),
        input_size=size,
        num_classes=10,
        plugins=[Batches(tasks, told=False, size=4096, rest=True)],
        evaluator=None,
        **options,
    )


def _extract_weights(model: nn.Module, target: dict[str, Any], excluded: set[str]) -> None:
    """As the library's, in memory of its own: on a CPU the library's kept weights are the trained ones themselves."""
    for name, parameter in SynapticIntelligencePlugin.allowed_parameters(model, excluded):
        target[name].data = parameter.detach().flatten().clone()


def _kept(method: str, strategy: Any) -> Iterator[Tensor]:
    """What a method keeps for the tasks to come, without what it makes anew from that."""
    plugins = {type(plugin).__name__: plugin for plugin in strategy.plugins}
    if method == "ewc":
        plugin = plugins["EWCPlugin"]
        for kept in (*plugin.importances.values(), *plugin.saved_params.values()):
            yield from (entry.data for entry in kept.values())
    elif method == "si":
        plugin = plugins["SynapticIntelligencePlugin"]
        for kept in (*plugin.ewc_data, plugin.syn_data["cum_trajectory"]):
            yield from (entry.data for entry in kept.values())
    elif method == "lwf":
        yield from plugins["LwFPlugin"].lwf.prev_model.parameters()
    elif method == "packnet":
        yield from (m.task_index for m in strategy.model.modules() if hasattr(m, "task_index"))
    elif method == "der":
        for image, _, _, logits in strategy.storage_policy.buffer:
            yield from (image, torch.zeros(1), logits)
    elif method == "slda":
        yield from (strategy.muK, strategy.cK, strategy.Sigma)
