"""Sequences of tasks: a split of the classes, or the same classes in other domains."""

from __future__ import annotations

from collections.abc import Sequence
from operator import methodcaller

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_cf.data.images import ImageData, ImageSplits, Transform
from lightning_cf.errors import ContinualError, check_count, check_kind, check_list, check_number
from lightning_cf.tasks.task import Task
from lightning_cf.utilities.randomness import keyed_generator


def split_tasks(
    source: ImageSplits,
    *,
    classes_per_task: int = 2,
    order: Sequence[int] | None = None,
    batch_size: int = 64,
    augment: Transform | None = None,
) -> list[Task]:
    """Tasks of a few classes each: task-incremental where the task is named, class-incremental where it is not.

    Args:
        source: the images of all classes.
        classes_per_task: how many classes make a task.
        order: the classes in the order in which they come; default from 0 up. May leave some out.
        batch_size: images in a training batch.
        augment: changes each batch of training images, such as :class:`RandomAffine`.
    """
    _check_source(source)
    check_count("tasks", "classes_per_task", classes_per_task)
    check_count("tasks", "batch_size", batch_size)
    known = sorted(set(source.train.labels.tolist()))
    classes = known if order is None else check_list("tasks", "order", order, "classes")
    strange = [c for c in classes if c not in known]
    if strange or len(set(classes)) < len(classes):
        raise ContinualError(f"tasks: order must name classes of {known}, each once, got {classes}.")
    if len(classes) % classes_per_task:
        raise ContinualError(
            f"tasks: {len(classes)} classes cannot be split into tasks of {classes_per_task};"
            " choose a classes_per_task that divides them, or leave classes out with order=[...]."
        )
    chunks = [classes[i : i + classes_per_task] for i in range(0, len(classes), classes_per_task)]
    return [
        Task(
            "-".join(map(str, chunk)),
            ImageData(source.map(methodcaller("of_classes", chunk)), batch_size=batch_size, augment=augment),
            classes=chunk,
        )
        for chunk in chunks
    ]


def permuted_tasks(
    source: ImageSplits, *, count: int = 5, batch_size: int = 64, seed: int = 0, augment: Transform | None = None
) -> list[Task]:
    """Tasks of all classes whose pixels are shuffled, each in a way of its own; the first is not (domain-incremental).

    Args:
        source: the images.
        count: how many tasks.
        batch_size: images in a training batch.
        seed: what the permutations depend on.
        augment: changes each batch of training images, before the permutation.
    """
    _check_source(source)
    check_count("tasks", "count", count)
    check_count("tasks", "seed", seed, least=0)
    pixels = source.train.images[0].numel()
    orders = [torch.arange(pixels)]
    orders += [torch.randperm(pixels, generator=keyed_generator("permutation", seed, i)) for i in range(1, count)]
    return [_domain(f"permutation-{i}", source, _permute(order), batch_size, augment) for i, order in enumerate(orders)]


def rotated_tasks(
    source: ImageSplits,
    *,
    count: int = 5,
    degrees: float = 36.0,
    batch_size: int = 64,
    augment: Transform | None = None,
) -> list[Task]:
    """Tasks of all classes, each rotated further than the one before (domain-incremental).

    Args:
        source: the images.
        count: how many tasks.
        degrees: between one task and the next.
        batch_size: images in a training batch.
        augment: changes each batch of training images, before the rotation.
    """
    _check_source(source)
    check_count("tasks", "count", count)
    check_number("tasks", "degrees", degrees)
    if degrees == 0 and count > 1:
        raise ContinualError("tasks: degrees must not be 0, or all tasks are the same one; got 0.")
    return [
        _domain(f"rotated-{i * degrees:g}", source, _rotate(i * degrees), batch_size, augment) for i in range(count)
    ]


def _check_source(source: object) -> None:
    check_kind("tasks", "source", source, ImageSplits, "a data set in three parts, such as lightning_cf.data.digits()")


def _domain(name: str, source: ImageSplits, transform: Transform, batch_size: int, augment: Transform | None) -> Task:
    check_count("tasks", "batch_size", batch_size)
    data = ImageData(source.map(methodcaller("transformed", transform)), batch_size=batch_size, augment=augment)
    return Task(name, data, classes=sorted(set(source.train.labels.tolist())))


def _permute(order: Tensor) -> Transform:
    return lambda images: images.flatten(1)[:, order].reshape(images.shape)


def _rotate(degrees: float) -> Transform:
    angle = torch.deg2rad(torch.tensor(degrees))
    matrix = torch.tensor([[angle.cos(), -angle.sin(), 0.0], [angle.sin(), angle.cos(), 0.0]])

    def rotate(images: Tensor) -> Tensor:
        if degrees % 360 == 0:
            return images
        grid = F.affine_grid(matrix.expand(len(images), 2, 3), list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, align_corners=False)

    return rotate
