"""All tasks in one loader: every sample once, with the number of its task."""

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, SubsetRandomSampler, TensorDataset, WeightedRandomSampler

from lightning_cf import ContinualError, Task
from lightning_cf.data.images import ImageData, ImageSplits, TensorImages
from lightning_cf.errors import DataWarning
from lightning_cf.sequence.joint import JointTask

CALLS = []


def numbers(first, count):
    """Images that hold one number each, which is their label too."""
    labels = torch.arange(first, first + count)
    return labels.float().reshape(-1, 1, 1, 1).expand(-1, 1, 2, 2), labels


def at_once(first, count):
    """A data set that gives whole batches."""

    def noted(images):
        CALLS.append(len(images))
        return images

    part = TensorImages(*numbers(first, count), noted)
    return ImageData(ImageSplits(part, part, part), batch_size=8)


def one_by_one(first, count):
    """A data set that gives samples."""
    loader = DataLoader(TensorDataset(*numbers(first, count)), 8)
    return {"train": loader, "val": loader}


class Lists(TensorDataset):
    """A data set that gives several samples as a list."""

    def __getitems__(self, indices):
        return [self[index] for index in indices]


def in_lists(first, count):
    loader = DataLoader(Lists(*numbers(first, count)), 8)
    return {"train": loader, "val": loader}


class Named(Dataset):
    """Samples that are dicts."""

    def __init__(self, first, count):
        self.images, self.labels = numbers(first, count)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"x": self.images[index], "y": self.labels[index]}


def named(first, count):
    loader = DataLoader(Named(first, count), 8)
    return {"train": loader, "val": loader}


@pytest.mark.parametrize(
    "kinds", [(at_once, at_once), (one_by_one, one_by_one), (in_lists, one_by_one), (at_once, in_lists), (named, named)]
)
def test_every_sample_comes_once_with_the_number_of_its_task(kinds):
    sizes, firsts = (13, 20), (0, 100)
    tasks = [
        Task(str(i), kind(first, size), classes=list(range(first, first + size)))
        for i, (kind, first, size) in enumerate(zip(kinds, firsts, sizes, strict=True))
    ]
    seen, together = [], False
    for batch, numbers_ in JointTask(tasks, None).train_dataloader():
        x, y = (batch["x"], batch["y"]) if isinstance(batch, dict) else batch
        assert torch.equal(x[:, 0, 0, 0].long(), y)
        assert torch.equal((y >= 100).long(), numbers_)
        together |= len(numbers_.unique()) == 2
        seen.append(y)
    assert together  # batches hold samples of both
    seen = torch.cat(seen).sort().values
    expected = torch.cat([torch.arange(first, first + size) for first, size in zip(firsts, sizes, strict=True)])
    if kinds[0] is at_once:  # leaves the last batch out where it is not full
        assert len(seen.unique()) == len(seen) == 32
    else:
        assert torch.equal(seen, expected)


def test_data_that_come_in_batches_are_fetched_in_batches():
    CALLS.clear()
    tasks = [Task(str(i), at_once(100 * i, 40), classes=list(range(100 * i, 100 * i + 40))) for i in range(2)]
    batches = list(JointTask(tasks, None).train_dataloader())
    assert len(CALLS) <= 2 * len(batches)  # one call a task and batch, not one a sample


def test_streams_are_refused():
    task = Task("stream", {"train": [numbers(0, 4)], "val": [numbers(0, 4)]}, classes=[0, 1, 2, 3])
    with pytest.raises(ContinualError, match="method='joint' mixes the samples of all tasks, but task 'stream'"):
        JointTask([task], None)


def test_joint_training_leaves_out_what_a_sampler_does():
    """What a SubsetRandomSampler does not draw may be another set; other samplers decide nothing, which is said."""
    data = TensorDataset(*numbers(0, 40))
    part = DataLoader(data, 8, sampler=SubsetRandomSampler(range(10)))
    task = Task("part", {"train": part, "val": part}, classes=range(40))
    assert sorted(int(y) for (_, labels), _ in JointTask([task], None).train_dataloader() for y in labels) == [
        *range(10)
    ]
    weighted = DataLoader(data, 8, sampler=WeightedRandomSampler(torch.ones(40), 40))
    with pytest.warns(DataWarning, match="the WeightedRandomSampler of task 'drawn' decides nothing there"):
        JointTask([Task("drawn", {"train": weighted, "val": weighted}, classes=range(40))], None)
