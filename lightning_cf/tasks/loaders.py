"""A task's loaders: opened as seldom as a Trainer would, read by us beside it, refused where they cannot be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader

from lightning_cf.errors import ContinualError, DataWarning, warn
from lightning_cf.lightning_api import (
    CombinedLoader,
    LightningDataModule,
    _replace_dunder_methods,
    is_overridden,
)
from lightning_cf.tasks.declared import WithData
from lightning_cf.tasks.holdout import Split, in_order, samples_of, split
from lightning_cf.tasks.reading import Limits, Reading, epoch_of, flat, several, side_by_side
from lightning_cf.tasks.streams import check_passes
from lightning_cf.tasks.targets import Place, labels_of, left_out, strange
from lightning_cf.utilities.randomness import isolated_generators

STAGES = ("train", "val", "test")


@dataclass
class Opened:
    """What a stage's loaders are, until the Trainer asks for others.

    Attributes:
        loader: as the data gave it.
        split: of a training loader from which samples are held out.
        handed: whether a Trainer has it.
        checked: whether it is known to give its batches again.
        apart: whether it is read in copies, since a look at it changes it.
        judges: the places of those validation or test loaders that are this task's, once that is known.
    """

    loader: Any
    split: Split
    handed: bool = False
    checked: bool = False
    apart: bool = False
    judges: tuple[int, ...] | None = None


class Loaders:
    """Opens and reads the loaders of a task.

    Attributes:
        limits: of the Trainer that the task has now.
        place: of the loader whose batch was read last, among the Trainer's loaders of that stage.
        batches: where training batches hold batches of several loaders, what of them the task can score: them
            ("whole"), the pairs in them ("pairs"), or validation data only ("val"). None until it was tried.
        place_of_targets: where in a batch the targets are that the task's own ``evaluate`` gives back as they are. None
            until it was tried, and where they are the second of a pair or computed.
        renumbered: whether they are computed from labels that are no classes of the task, and are classes of it.

    Args:
        task: whose.
    """

    def __init__(self, task: WithData) -> None:
        self.task = task
        self.limits = Limits()
        self.opened: dict[str, Opened] = {}
        self.place = 0
        self.batches: str | None = None
        self.place_of_targets: Place | None = None
        self.renumbered = False
        self.held_out_of: tuple[Any, ...] | None = None
        self.told: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Without loaders that are open: a copy opens its own."""
        return {**self.__dict__, "opened": {}}

    # What a Trainer asks for

    def hand(self, stage: str) -> Any:
        """The loaders for a Trainer: those that are open, unless one had them already."""
        known = self.opened.get(stage)
        if known is not None and known.handed:
            del self.opened[stage]
        opened = self._open(stage, requested=True)
        opened.handed = True
        return opened.split.train

    def attach(self, trainer: Any, *, another: bool) -> None:
        """A Trainer comes: its limits hold, and loaders that another one had are opened anew."""
        self.limits = Limits.of(trainer)
        if another:
            self.drop(*(stage for stage, opened in self.opened.items() if opened.handed))

    def drop(self, *stages: str) -> None:
        """Forgets what is open: the data behind it changed."""
        for stage in stages:
            self.opened.pop(stage, None)

    # What we read

    def training(self, *, ordered: bool = False) -> Reading:
        """Training data, less what is held out; ``ordered``: each sample once, where that can be known."""
        train = self._readable("train").split.train
        return self._reading("train", [(0, in_order(train) if ordered else train)], ("train",))

    def judging(self) -> Reading:
        """Validation data, else what is held out or, failing that, all training data."""
        if self.validates():
            return self._of_this_task("val")
        opened = self._readable("train")
        reading = self._reading("train", [(0, opened.split.held)], ("val", "train"))
        pairs = self.batches == "pairs" and self.side_by_side
        return replace(reading, parts=pairs_in) if pairs else reading

    def testing(self) -> Reading | None:
        """Test data of this task alone; None where its data have no test loader."""
        return self._of_this_task("test") if self._given("test") else None

    def given(self, *stages: str) -> dict[str, Any]:
        """By stage the loaders as the data give them; what is open is not opened again."""
        return {stage: self._open(stage).loader for stage in stages if self._given(stage)}

    def check(self) -> None:
        """Raises ContinualError for data that cannot be read again."""
        self._readable("train")
        if "val" in self.opened:
            self._readable("val")

    def validates(self, *, requested: bool = False) -> bool:
        """Whether the data bring a validation set."""
        return self._given("val", requested=requested)

    @property
    def side_by_side(self) -> bool:
        """Whether a training batch holds batches of several loaders."""
        return side_by_side(self._open("train").loader)

    def whole(self) -> str:
        """Why nothing is held out though there is no validation set; empty if something is, or nobody wants it."""
        if self.task.holdout == 0 or self.validates():
            return ""
        return self._open("train").split.why

    def labels_of(self, batch: Any, columns: int | None = None) -> Tensor | None:
        """The labels of a batch, one a sample, as far as it is known where they are; see ``targets.labels_of``."""
        return None if self.renumbered else labels_of(batch, columns, self.place_of_targets)

    # How

    def _given(self, stage: str, *, requested: bool = False) -> bool:
        if not is_overridden(f"{stage}_dataloader", self.task.data, parent=LightningDataModule):
            return False
        loader = self._open(stage, requested=requested).loader
        return loader is not None and not (isinstance(loader, (list, tuple, dict)) and len(loader) == 0)

    def _open(self, stage: str, *, requested: bool = False) -> Opened:
        if stage not in self.opened:
            self.task.set_up(stage)
            ask = getattr(self.task.data, f"{stage}_dataloader")
            # What a Trainer asks for is recorded by it: it may make the loader anew.
            loader = ask() if requested else _recorded(ask)
            self._check_there(stage, loader)
            parts = Split(loader, loader)
            if stage == "train" and self.task.holdout > 0 and not self.validates(requested=requested):
                if several(loader):
                    parts = Split(loader, loader, "its batches come from several loaders")
                elif self.limits.overfits:
                    parts = Split(loader, loader, "overfit_batches trains on the first samples only")
                else:
                    parts = split(
                        loader,
                        self.task.holdout,
                        name=self.task.name,
                        processes=self.limits.processes,
                        classes=self.task.classes is not None,
                    )
                    if not parts.why:
                        self._check_same(loader)
                    if not parts.why and self.limits.suffice(len(loader)) and not self.limits.suffice(len(parts.train)):
                        why = "limit_train_batches or val_check_interval counts on all of its batches"
                        parts = Split(loader, loader, why)
            self.opened[stage] = Opened(loader, parts)
        return self.opened[stage]

    def _check_same(self, loader: Any) -> None:
        """Warns where samples are held out of others than before: what judged may be trained on then."""
        found = samples_of(loader.dataset)
        if self.held_out_of not in (None, found):
            warn(
                f"Task '{self.task.name}': its train_dataloader() gives other samples than before, so that some that"
                " were held out to judge its partition are trained on. Draw the split once, such as from a seeded"
                " generator, or give the task a validation loader.",
                DataWarning,
            )
        self.held_out_of = found

    def _check_there(self, stage: str, loader: Any) -> None:
        """Raises ContinualError where there is None in place of training data, or of one of several loaders."""
        if (loader is None and stage == "train") or (several(loader) and any(each is None for each in flat(loader))):
            what = "None" if loader is None else "several loaders, one of which is None"
            raise ContinualError(
                f"Task '{self.task.name}': its {stage}_dataloader() gives {what}; let it give a DataLoader, or leave"
                " out what is not there."
            )

    def _readable(self, stage: str) -> Opened:
        opened = self._open(stage)
        if not opened.checked:
            most = int(min(256, self.limits.batches_of(opened.loader, stage)))
            opened.apart = check_passes(opened.loader, f"Task '{self.task.name}': its {stage}_dataloader()", most)
            opened.checked = True
        return opened

    def _reading(self, stage: str, loaders: list[tuple[int, Any]], stages: tuple[str, ...]) -> Reading:
        what = f"Task '{self.task.name}': its {stage}_dataloader()"
        apart, epoch = self.opened[stage].apart, epoch_of(getattr(self.task, "trainer", None))
        return Reading(loaders, self.limits, stages, what, self._at, apart=apart, epoch=epoch, told=self.told)

    def _at(self, place: int) -> None:
        self.place = place

    def _of_this_task(self, stage: str) -> Reading:
        """Those of several validation or test loaders whose labels are the task's; the first where all may be."""
        opened = self._readable(stage)
        together = not several(opened.loader) or side_by_side_of(opened.loader)
        loaders = [opened.loader] if together else flat(opened.loader)
        reading = self._reading(stage, list(enumerate(loaders)), (stage,))
        if opened.judges is None:
            opened.judges = (0,) if len(loaders) == 1 else self._choose(stage, reading)
        return reading.of(*opened.judges)

    def _choose(self, stage: str, reading: Reading) -> tuple[int, ...]:
        task, found, count = self.task, {}, len(reading.loaders)
        for place, _ in reading.loaders:
            with isolated_generators():
                batch = next(iter(reading.of(place)), None)
            if batch is None:
                continue  # an empty loader is nobody's
            labels = self.labels_of(batch)
            found[place] = None if labels is None or task.classes is None else labels.cpu()
        besides = left_out(task)
        other = {at: strange(x, task.classes or [], besides) for at, x in found.items() if x is not None}
        fit = tuple(at for at in found if not other.get(at)) if found else (0,)
        if not fit:
            holds = ", ".join(f"label {labels[0]} in loader {at}" for at, labels in other.items())
            raise ContinualError(
                f"Task '{task.name}' declares classes {task.classes}, but none of its {count} {stage} loaders is"
                f" of these alone: {holds}. Give it a loader of its own data:"
                f" Task(..., {{'train': ..., '{stage}': ...}})."
            )
        if len(found) < 2 or (len(fit) < len(found) and all(at in other for at in found)):
            return fit
        warn(
            f"Task '{task.name}' has {count} {stage} loaders, and no labels tell which of them is its own: it"
            f" is scored on loader {fit[0]}. Give it a loader of its own data:"
            f" Task(..., {{'train': ..., '{stage}': ...}}).",
            DataWarning,
        )
        return fit[:1]


def side_by_side_of(loader: Any) -> bool:
    """Whether validation or test loaders come side by side: only where a CombinedLoader says so."""
    return isinstance(loader, CombinedLoader) and side_by_side(loader)


def pairs_in(batch: Any) -> Iterator[Any]:
    """The (input, target) pairs among the batches that a batch of several loaders holds."""
    if _is_pair(batch):
        yield batch
    elif isinstance(batch, dict):
        for each in batch.values():
            yield from pairs_in(each)
    elif isinstance(batch, (list, tuple)):
        for each in batch:
            yield from pairs_in(each)


def _is_pair(batch: Any) -> bool:
    return isinstance(batch, (list, tuple)) and len(batch) == 2 and all(isinstance(x, Tensor) for x in batch)


def _recorded(ask: Callable[[], Any]) -> Any:
    """A loader that is made as Lightning has it, which keeps what it was made from.

    Lightning changes the classes meanwhile, and leaves them so where an error passes through.
    """
    with _replace_dunder_methods(DataLoader, "dataset"), _replace_dunder_methods(BatchSampler):
        try:
            return ask()
        except BaseException as error:
            failure = error
    raise failure  # out here, where the classes are what they were
