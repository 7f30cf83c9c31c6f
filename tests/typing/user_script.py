"""What somebody writes who has types checked strictly. Neither checker finds anything here."""

from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

import lightning_cf as lc
from lightning_cf.data import digits, split_tasks
from lightning_cf.models import MLP


def network() -> LightningModule:
    return lc.Classifier(MLP(shape=(1, 8, 8), classes=10, hidden=(100, 100)))


def one_by_one(tasks: list[lc.Task], checkpoint: Path) -> lc.NeuronLedger:
    net, subspace = network(), lc.LearnedSubspace(dimensions=0.1)
    partition = lc.PartitionCallback(after=0.6, measure="activation", threshold="auto")
    invariance = lc.InvarianceCallback(perturbation=lc.Rotation(degrees=90), subspace=subspace, every_n_steps=5)
    for task in tasks:
        trainer = Trainer(max_epochs=2, callbacks=[partition, invariance, lc.MaskedGradientCallback(subspace=subspace)])
        trainer.fit(net, datamodule=task)
        trainer.save_checkpoint(checkpoint)
    lc.keep_ledger(network(), ledger := lc.NeuronLedger.from_checkpoint(checkpoint))
    return ledger


def all_at_once(tasks: list[lc.Task], root: Path) -> tuple[float, Tensor]:
    net, trainer = lc.ContinualModule(network()), partial(Trainer, accelerator="auto")
    result = lc.SequentialTaskRunner(net, tasks, trainer=trainer, epochs=2, invariance_epochs=1, root=root).run()
    return result.accuracy.forgetting, net.predict(torch.zeros(4, 1, 8, 8)).classes


if __name__ == "__main__":
    mine, folder = split_tasks(digits(), batch_size=32), Path("run")
    print(one_by_one(mine[:2], folder / "checkpoint.ckpt").tasks, all_at_once(mine, folder))
