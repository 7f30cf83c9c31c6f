"""What somebody writes who has types checked strictly. Neither checker finds anything here."""

from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_cf import (
    Classifier,
    ContinualModule,
    InvarianceCallback,
    LearnedSubspace,
    MaskedGradientCallback,
    NeuronLedger,
    PartitionCallback,
    Rotation,
    SequentialTaskRunner,
    Task,
    keep_ledger,
)
from lightning_cf.data import digits, split_tasks
from lightning_cf.models import MLP


def network() -> LightningModule:
    return Classifier(MLP(shape=(1, 8, 8), classes=10, hidden=(100, 100)))


def one_by_one(tasks: list[Task], checkpoint: Path) -> NeuronLedger:
    subspace = LearnedSubspace(dimensions=0.1)
    net, partition = network(), PartitionCallback(after=0.6, measure="activation", threshold="auto")
    invariance = InvarianceCallback(perturbation=Rotation(degrees=90), subspace=subspace, every_n_steps=5)
    for task in tasks:
        callbacks = [partition, invariance, MaskedGradientCallback(subspace=subspace)]
        trainer = Trainer(max_epochs=2, callbacks=[*callbacks])
        trainer.fit(net, datamodule=task)
        trainer.save_checkpoint(checkpoint)
    ledger = NeuronLedger.from_checkpoint(checkpoint)
    keep_ledger(network(), ledger)
    return ledger


def all_at_once(tasks: list[Task], root: Path) -> tuple[float, Tensor]:
    net = ContinualModule(network())
    trainer = partial(Trainer, accelerator="auto")
    result = SequentialTaskRunner(net, tasks, trainer=trainer, epochs=2, invariance_epochs=1, root=root).run()
    return result.accuracy.forgetting, net.predict(torch.zeros(4, 1, 8, 8)).classes


if __name__ == "__main__":
    folder = Path("run")
    print(one_by_one(split_tasks(digits(), batch_size=32)[:2], folder / "checkpoint.ckpt").tasks)
    print(all_at_once(split_tasks(digits(), batch_size=32), folder))
