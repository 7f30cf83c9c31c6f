"""Small networks for images: a perceptron, a convolutional and a residual one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_cf.errors import ContinualError, check_count, check_list

Images = Float[Tensor, "batch channels height width"]
Logits = Float[Tensor, "batch classes"]


class MLP(nn.Sequential):
    """Fully connected layers with ReLU.

    Args:
        shape: of one input, without the batch.
        classes: number of outputs.
        hidden: widths of the hidden layers.
    """

    def __init__(self, *, shape: Sequence[int], classes: int, hidden: Sequence[int] = (400, 400)) -> None:
        check_count("MLP", "classes", classes)
        layers: list[nn.Module] = [nn.Flatten()]
        width = int(torch.Size(_sizes("MLP", "shape", shape)).numel())
        for units in _sizes("MLP", "hidden", hidden):
            layers += [nn.Linear(width, units), nn.ReLU()]
            width = units
        super().__init__(*layers, nn.Linear(width, classes))


class CNN(nn.Module):
    """Convolutions with BatchNorm and ReLU, each but the last followed by a pooling to half the size.

    Args:
        shape: (channels, height, width) of one image.
        classes: number of outputs.
        channels: of each convolution.
        hidden: width of the layer between convolutions and outputs.
    """

    def __init__(
        self, *, shape: Sequence[int], classes: int, channels: Sequence[int] = (32, 64), hidden: int = 128
    ) -> None:
        super().__init__()
        check_count("CNN", "classes", classes)
        layers: list[nn.Module] = []
        width, *sides = _sizes("CNN", "shape", shape, count=3)
        height = min(sides)
        for position, units in enumerate(_sizes("CNN", "channels", channels)):
            layers += [nn.Conv2d(width, units, 3, padding=1, bias=False), nn.BatchNorm2d(units), nn.ReLU()]
            if position < len(channels) - 1 and height >= 2:
                layers.append(nn.MaxPool2d(2))
                height //= 2
            width = units
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(min(4, height)), nn.Flatten())
        check_count("CNN", "hidden", hidden)
        self.classifier = nn.Sequential(
            nn.Linear(width * min(4, height) ** 2, hidden), nn.ReLU(), nn.Linear(hidden, classes)
        )

    def forward(self, x: Images) -> Logits:
        """Logits of a batch of images."""
        logits: Tensor = self.classifier(self.features(x))
        return logits


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut (He et al. 2016, basic block).

    Args:
        inputs: channels in.
        outputs: channels out.
        stride: of the first convolution and the shortcut.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Images) -> Float[Tensor, "batch outputs rows columns"]:
        """Features of the same or half the size."""
        y = F.relu(self.first_norm(self.first(x)))
        return F.relu(self.second_norm(self.second(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """A stem, stages of residual blocks of which each but the first halves the size, mean pooling and a linear head.

    Args:
        shape: (channels, height, width) of one image.
        classes: number of outputs.
        channels: of each stage.
        blocks: in each stage.
    """

    def __init__(
        self, *, shape: Sequence[int], classes: int, channels: Sequence[int] = (32, 64), blocks: int = 1
    ) -> None:
        super().__init__()
        check_count("ResNet", "blocks", blocks)
        check_count("ResNet", "classes", classes)
        shape = _sizes("ResNet", "shape", shape, count=3)
        channels = _sizes("ResNet", "channels", channels)
        if not channels:
            raise ContinualError("ResNet: channels must name the width of one stage at least, got none.")
        width = channels[0]
        self.stem = nn.Sequential(
            nn.Conv2d(shape[0], width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        stages: list[nn.Module] = []
        for stage, units in enumerate(channels):
            for block in range(blocks):
                stages.append(ResidualBlock(width, units, stride=2 if stage and not block else 1))
                width = units
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Images) -> Logits:
        """Logits of a batch of images."""
        logits: Tensor = self.head(self.stages(self.stem(x)).mean(dim=(2, 3)))
        return logits


def _sizes(owner: str, name: str, sizes: Sequence[int], *, count: int | None = None) -> list[int]:
    """Whole numbers from 1 on, as many as there must be."""
    checked = [check_count(owner, name, size) for size in check_list(owner, name, sizes, "whole numbers")]
    if count is not None and len(checked) != count:
        raise ContinualError(f"{owner}: {name} must be (channels, height, width), got {list(sizes)}.")
    return checked
