"""Split-CIFAR-10: five tasks of two classes, a small CNN on a CPU, and nobody says which task an image is of."""

import io
import json
import logging
import warnings
from argparse import ArgumentParser, Namespace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from common import QUIET, markdown, percent, write_section
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

METHODS = {
    "exact": "partition",
    "finetune": "finetune",
    "joint, over all outputs": "joint",
    "joint, over all outputs, unchanged images": "joint",
}
"""What the runner calls them."""

BANKS = {"236_patches": (236, 2), "134_patches": (134, (2, 1))}
"""Classifiers in closed form: how many patches each looks at, in which cells, beside the first task's units; the first
predicts."""

FIRST = 0.66
"""The first task's share of the units, at which these look; later tasks claim about a twelfth each."""

JUDGING = 3000
"""So many of the training images, the last ones, judge partitions and choose options."""


def images(file: Path) -> tuple[Tensor, Tensor]:
    """All images of a file that holds JPEGs one after another, and their labels."""
    held = np.load(file)
    data, ends = held["jpeg"].tobytes(), held["ends"].tolist()
    pixels = [
        np.asarray(Image.open(io.BytesIO(data[start:end])).convert("RGB"))
        for start, end in zip([0, *ends], ends, strict=False)
    ]
    x = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
    return x, torch.from_numpy(held["labels"]).long()


def augmented(x: Tensor) -> Tensor:
    """Random crops of half to all of the area, flips, other contrast and colour."""
    count = len(x)
    size, flip = torch.empty(count).uniform_(0.5, 1).sqrt(), 1 - 2 * (torch.rand(count) < 0.5).float()
    matrix = torch.zeros(count, 2, 3)
    matrix[:, 0, 0], matrix[:, 1, 1] = size * flip, size
    matrix[:, :, 2] = (1 - size)[:, None] * (2 * torch.rand(count, 2) - 1)
    x = F.grid_sample(x, F.affine_grid(matrix, list(x.shape), align_corners=False), align_corners=False)
    gain, shift = torch.empty(count, 3, 1, 1).uniform_(0.6, 1.4), torch.empty(count, 3, 1, 1).uniform_(-0.1, 0.1)
    return x * gain + shift


class Network(nn.Module):
    """Three convolutions and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 64)
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths))
        self.hidden, self.head = nn.Linear(64 * 16, 128), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = (x - 0.47) / 0.25
        for convolution in self.convolutions:
            x = F.max_pool2d(F.relu(convolution(x)), 2)
        return self.head(F.relu(self.hidden(x.flatten(1))))


def run(options: Namespace, limit: int | None, method: str, seed: int) -> dict:
    """One sequence; leaves its scores in a file."""
    from lightning.pytorch import Trainer

    import lightning_cf as cf
    from lightning_cf.data import ImageSplits, TensorImages, split_tasks
    from lightning_cf.task_inference.accumulated import Accumulated
    from lightning_cf.task_inference.features import FirstUnits, PatchBank

    folder = options.runs / "cifar" / f"{limit}-{method.replace(' ', '-')}-{seed}"
    file = folder / "scores.json"
    if file.exists():
        return json.loads(file.read_text())

    class Augmented(cf.Classifier):
        """Trains on changed images; what is read beside training is unchanged."""

        def training_step(self, batch, batch_idx):
            x, y = batch
            return super().training_step((x if method.endswith("unchanged images") else augmented(x), y), batch_idx)

    epochs = options.epochs or (12 if limit is None else 60)
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    (x, y), test = images(options.data_dir / "train.npz"), images(options.data_dir / "test.npz")
    last = len(x) - JUDGING
    count = last if limit is None else min(limit, last)
    splits = ImageSplits(TensorImages(x[:count], y[:count]), TensorImages(x[last:], y[last:]), TensorImages(*test))
    tasks = split_tasks(splits, batch_size=100)
    torch.manual_seed(seed)
    module = Augmented(Network(), optimizer=partial(torch.optim.AdamW, lr=options.lr, weight_decay=0.001))
    units = FirstUnits(2, mirrored=True, power=0.5)
    banks = [
        Accumulated(name, features=PatchBank(filters, grid=grid, power=0.5) + units)
        for name, (filters, grid) in BANKS.items()
    ]
    rest = {"masking": cf.MaskedGradientCallback(mask_outputs=False)} if method.startswith("joint") else {}
    if METHODS[method] == "partition":
        rest["task_inference"] = cf.TaskInferenceCallback(banks)
    runner = cf.SequentialTaskRunner(
        module,
        tasks,
        trainer=partial(Trainer, **QUIET),
        epochs=epochs,
        invariance_epochs=max(1, epochs // 3),
        partition=cf.PartitionCallback(min_claim=[FIRST, 0.08], max_claim=[FIRST, 0.1]),
        method=METHODS[method],
        seed=seed,
        root=folder / "run",
        score_on=options.score_on,
        **rest,
    )
    document = runner.run().as_dict(seed=seed, config={})
    kept = {
        key: document[key]
        for key in ("average_accuracy", "forgetting", "class_incremental", "task_inference", "seconds")
    }
    file.write_text(json.dumps(kept))
    return kept


def rows(options: Namespace, limit: int | None, method: str) -> list[list[str]]:
    """What a method reached after learning from so many images, mean and deviation over seeds; a row a classifier."""
    found = [run(options, limit, method, seed) for seed in options.seeds]
    names = list(BANKS) if METHODS[method] == "partition" else [""]
    return [row(limit, method, name, found) for name in names]


def row(limit: int | None, method: str, name: str, found: list[dict]) -> list[str]:
    """The same for one classifier, or for the highest of all outputs."""
    told = [f["task_inference"][name] if name else f["class_incremental"] for f in found]
    return [
        str(limit or "all"),
        method,
        f"`{name}`" if name else "highest output",
        percent([f["average_accuracy"] for f in found]),
        percent([t["task_incremental_accuracy"] for t in told]) if name else "",
        percent([t["average_accuracy"] for t in told]),
        ", ".join(f"{100 * t['average_accuracy']:.2f}" for t in told),
        percent([f["forgetting"] for f in found]),
        f"{mean(t['none_auroc_mean'] for t in told):.3f}" if name else "",
        f"{mean(t['stored_floats'] for t in told):.0f}" if name else "0",
        f"{mean(f['seconds'] for f in found) / 60:.0f}",
    ]


def main() -> None:
    parser = ArgumentParser()
    parser.add_argument("--data-dir", type=Path, required=True, help="folder that holds train.npz and test.npz")
    parser.add_argument("--limits", type=int, nargs="+", default=[8000], help="learn from so many images; 0 for all")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--epochs", type=int, help="of LEARN, and a third of it of INVARIANCE; default 60, 12 for all")
    parser.add_argument("--lr", type=float, default=0.004)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--score-on", default="test")
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmarks"))
    options = parser.parse_args()
    lines = [
        line for limit in options.limits for method in options.methods for line in rows(options, limit or None, method)
    ]
    head = ["images", "method", "told by", "task-incremental %", "with it", "class-incremental %", "each seed"]
    write_section("cifar", markdown([*head, "forgetting", "AUROC of none", "numbers kept", "minutes"], lines))


if __name__ == "__main__":
    main()
