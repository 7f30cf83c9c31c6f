"""Three mistakes that both checkers are to find, each on the line that says so, and no others."""

from pathlib import Path

from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_cf import PartitionCallback, SequentialTaskRunner, Task


def mistaken(net: LightningModule, data: DataLoader[tuple[Tensor, Tensor]], root: Path) -> float:
    tasks = [Task("zero-one", data, classes=[0, 1])]  # planted: loaders stand under the stage they are for
    partition = PartitionCallback(measure="size")  # planted: no such measure
    result = SequentialTaskRunner(net, tasks, partition=partition, root=root).run()
    return result.accuracy.forgeting  # planted: misspelt
