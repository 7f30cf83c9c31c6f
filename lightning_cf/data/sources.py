"""Where images come from: scikit-learn's digits, which ship with it, and MNIST's files."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lightning_cf.data.images import ImageSplits, TensorImages
from lightning_cf.errors import ContinualError, check_count, check_path

_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def digits() -> ImageSplits:
    """1797 handwritten digits of 8 x 8 pixels (UCI, Alpaydin and Kaynak 1998), from inside scikit-learn.

    The split is fixed and stratified: 60% to train, 15% to judge, 25% to test.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = torch.from_numpy(data.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(data.target).long()
    rest, test = train_test_split(np.arange(len(labels)), test_size=0.25, stratify=labels, random_state=0)
    train, val = train_test_split(rest, test_size=0.2, stratify=labels[rest], random_state=0)
    return ImageSplits(*(TensorImages(images[index], labels[index]) for index in (train, val, test)))


def mnist(data_dir: str | Path | None, *, download: bool = False, limit: int | None = None) -> ImageSplits:
    """MNIST: 60,000 and 10,000 digits of 28 x 28 pixels, of which the last 5,000 to train are kept to judge.

    Args:
        data_dir: folder that holds ``MNIST/raw`` with the IDX files, plain or gzipped, as torchvision lays them out.
        download: fetch them with torchvision if they are not there.
        limit: learn from the first so many images only; judged and tested on as many as ever.

    Raises:
        ContinualError: if the files are not there.
    """
    if data_dir is None:
        raise ContinualError("MNIST needs data_dir=FOLDER, the folder that holds MNIST/raw with the IDX files.")
    raw = check_path("MNIST", "data_dir", data_dir) / "MNIST" / "raw"
    if download:
        from torchvision.datasets import MNIST

        MNIST(str(data_dir), download=True)
    (train_x, train_y), (test_x, test_y) = (
        (_read(raw, images).float().unsqueeze(1) / 255, _read(raw, labels).long()) for images, labels in _FILES.values()
    )
    learned = len(train_x) - 5000 if limit is None else min(check_count("mnist", "limit", limit), len(train_x) - 5000)
    return ImageSplits(
        TensorImages(train_x[:learned], train_y[:learned]),
        TensorImages(train_x[-5000:], train_y[-5000:]),
        TensorImages(test_x, test_y),
    )


def _read(folder: Path, name: str) -> Tensor:
    """An array in the IDX format: two zero bytes, a type, the number of axes, their sizes as big-endian, the data."""
    for path, opened in ((folder / name, open), (folder / f"{name}.gz", gzip.open)):
        if path.exists():
            with opened(path, "rb") as file:
                content = file.read()
            if content[:3] != b"\x00\x00\x08":
                raise ContinualError(f"{path} is no IDX file of bytes; fetch it again.")
            if len(content) < 4 + 4 * content[3]:
                raise ContinualError(f"{path} is cut off in its header; fetch it again.")
            shape = np.frombuffer(content, ">u4", content[3], 4).astype(int)
            if len(content) != 4 + 4 * content[3] + int(shape.prod()):
                raise ContinualError(
                    f"{path} does not hold the {shape.prod()} bytes its header promises; fetch it again."
                )
            return torch.from_numpy(np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(shape).copy())
    raise ContinualError(
        f"MNIST: no file {name} or {name}.gz in {folder}. Set data_dir to the folder that holds MNIST/raw, or"
        " tasks.source.download=true to fetch it with torchvision (pip install 'lightning-cf[download]')."
    )
