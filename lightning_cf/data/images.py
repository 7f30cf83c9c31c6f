"""Labelled images in memory, fetched a batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from lightning_cf.errors import ContinualError
from lightning_cf.lightning_api import LightningDataModule

Batch = tuple[Tensor, Tensor]
Transform = Callable[[Tensor], Tensor]


class TensorImages(Dataset[Batch]):
    """Images and labels in memory.

    Args:
        images: float, in [0, 1].
        labels: class of each image.
        transform: applied to each batch of images that is fetched.
    """

    def __init__(
        self,
        images: Float[Tensor, "samples channels height width"],
        labels: Int64[Tensor, "samples"],
        transform: Transform | None = None,
    ) -> None:
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """One batch; torch's loader calls this in place of ``__getitem__`` for each of its samples."""
        images = self.images[indices]
        return (images if self.transform is None else self.transform(images)), self.labels[indices]

    def of_classes(self, classes: Sequence[int]) -> TensorImages:
        """The images of some classes only, with their labels as they were."""
        chosen = torch.isin(self.labels, torch.tensor(list(classes)))
        return TensorImages(self.images[chosen], self.labels[chosen], self.transform)

    def transformed(self, transform: Transform) -> TensorImages:
        """The same images seen through a transform."""
        return TensorImages(self.images, self.labels, transform)

    def augmented(self, augment: Transform) -> TensorImages:
        """The same images, each batch changed before the transform."""
        transform = self.transform
        return self.transformed(augment if transform is None else lambda images: transform(augment(images)))


@dataclass(frozen=True)
class ImageSplits:
    """A data set in three parts.

    Attributes:
        train: to learn from.
        val: to judge partitions on.
        test: to report.
    """

    train: TensorImages
    val: TensorImages
    test: TensorImages

    def map(self, change: Callable[[TensorImages], TensorImages]) -> ImageSplits:
        """The same change of every part."""
        return ImageSplits(change(self.train), change(self.val), change(self.test))


class ImageData(LightningDataModule):
    """Loaders over a data set in three parts.

    Args:
        splits: the data.
        batch_size: images in a training batch; a last batch that is not full is left out.
        augment: changes each batch of training images, before any transform of the data.
    """

    def __init__(self, splits: ImageSplits, *, batch_size: int, augment: Transform | None = None) -> None:
        super().__init__()
        if augment is not None and not callable(augment):
            raise ContinualError(f"ImageData: augment must change a batch of images, got {augment!r}.")
        self.splits, self.batch_size = splits, batch_size
        if augment is not None:
            self.splits = replace(splits, train=splits.train.augmented(augment))

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled training batches; a last one that is not full is left out unless it is the only one."""
        full = len(self.splits.train) >= self.batch_size
        return DataLoader(
            self.splits.train, self.batch_size, shuffle=len(self.splits.train) > 0, drop_last=full, collate_fn=_collate
        )

    def val_dataloader(self) -> DataLoader[Batch]:
        """Validation images in their order, 1024 a batch."""
        return DataLoader(self.splits.val, 1024, collate_fn=_collate)

    def test_dataloader(self) -> DataLoader[Batch]:
        """Test images in their order, 1024 a batch."""
        return DataLoader(self.splits.test, 1024, collate_fn=_collate)


def _collate(batch: Batch | list[Batch]) -> Batch:
    """A batch that was fetched at once stays as it is."""
    if isinstance(batch, list):
        images, labels = default_collate(batch)
        return images, labels
    return batch
