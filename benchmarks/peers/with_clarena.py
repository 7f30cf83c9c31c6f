"""CLArena's HAT: its algorithm, its masked MLP and its heads, through its own training step."""

from __future__ import annotations

import logging
from functools import partial

from clarena.backbones import HATMaskMLP
from clarena.cl_algorithms import HAT
from clarena.heads import HeadsTIL
from lightning import Trainer
from protocol import BATCH, CLASSES, HIDDEN, Job
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_cf.data import RandomAffine, TensorImages
from lightning_cf.data.images import ImageData, ImageSplits


class ClarenaPeer:
    """HAT, task after task as CLArena's main experiment goes through them; its tasks count from 1."""

    def __init__(self, job: Job, tasks: list[TensorImages]) -> None:
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        self.job, self.tasks = job, tasks
        backbone = HATMaskMLP(input_dim=784, hidden_dims=[HIDDEN], output_dim=HIDDEN, gate="sigmoid")
        self.model = HAT(backbone=backbone, heads=HeadsTIL(input_dim=HIDDEN), adjustment_mode="hat", **job.options)

    def learn(self, task: int) -> None:
        self.model.setup_task_id(task + 1, len(CLASSES[task]), partial(_optimizer, self.job), None)
        trainer = Trainer(
            max_epochs=self.job.epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(self.model.train(), train_dataloaders=self._loader(task))

    def told(self, images: Tensor, task: int) -> Tensor:
        return self.model.eval().forward(images, stage="test", task_id=task + 1)[0]

    def untold(self, images: Tensor) -> Tensor | None:
        return None

    def kept(self) -> int:
        kept = [*self.model.backbone.masks.values(), self.model.cumulative_mask_for_previous_tasks]
        return sum(mask.numel() for masks in kept for mask in masks.values())

    def _loader(self, task: int) -> DataLoader:
        data = TensorImages(self.tasks[task].images, self.tasks[task].labels - CLASSES[task][0])
        return ImageData(ImageSplits(data, data, data), batch_size=BATCH, augment=RandomAffine()).train_dataloader()


def make(job: Job, tasks: list[TensorImages]) -> ClarenaPeer:
    """The peer of a job."""
    return ClarenaPeer(job, tasks)


def _optimizer(job: Job, params: object) -> object:
    return job.make_optimizer(params)
