"""Nobody says which task it is, without images: from which of ten modules of Python's library is a piece of text?

Three networks see the same pieces: convolutions over bytes, an MLP over a row of features (counts of pairs of bytes),
and the same MLP behind bytes, which counts in its forward pass, so that task inference sees the bytes.
"""

import importlib.util
import json
import logging
import platform
import warnings
from argparse import ArgumentParser, Namespace
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from statistics import mean

import torch
from common import QUIET, markdown, percent, write_section
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

MODULES = (
    *("_pydecimal", "typing", "argparse", "tarfile", "doctest"),
    *("inspect", "pickletools", "zipfile", "difflib", "subprocess"),
)
LENGTH, BLOCK = 128, 2048
"""Bytes of a piece; bytes that lie together in one part of the data, so that no piece is in two."""
FEATURES = 1024
VARIANTS = ("unchanged", "joint")
"""All strategies that train over unchanged inputs; and all modules at once, over all outputs: what can be reached where
nobody names the task."""
BUDGETS = (3_000_000, 900_000)
"""Numbers that ``lda`` may keep, in runs of their own, beside the network that counts."""


class Characters(nn.Module):
    """Convolutions over embedded bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, 40)
        self.first, self.second = nn.Conv1d(40, 80, 5, padding=2), nn.Conv1d(80, 80, 5, stride=2, padding=2)
        self.hidden, self.head = nn.Linear(80, 100), nn.Linear(100, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).transpose(1, 2)
        x = F.relu(self.second(F.relu(self.first(x)))).amax(dim=2)
        return self.head(F.relu(self.hidden(x)))


class Counts(nn.Module):
    """Counts pairs of bytes; nothing of it is trained."""

    def forward(self, pieces: Tensor) -> Tensor:
        return counts(pieces)


def counting() -> nn.Module:
    return nn.Sequential(Counts(), *perceptron())


def perceptron() -> nn.Sequential:
    """Two hidden layers over the features."""
    layers = nn.Linear(FEATURES, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU()
    return nn.Sequential(*layers, nn.Linear(200, 10))


def counts(pieces: Tensor) -> Tensor:
    """Logarithms of how often pairs of bytes occur, the pairs in ``FEATURES`` bins."""
    pairs = (pieces[:, :-1] * 256 + pieces[:, 1:]) * 2_654_435_761 % 2**32 * FEATURES // 2**32
    found = torch.zeros(len(pieces), FEATURES).scatter_add_(1, pairs, torch.ones(pairs.shape))
    return found.log1p()


@cache
def pieces() -> dict[str, tuple[Tensor, Tensor]]:
    """Pieces of text and the module that each is of; seven blocks in ten train, the others are for val and test."""
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {"train": [], "val": [], "test": []}
    for label, name in enumerate(MODULES):
        found = importlib.util.find_spec(name)
        assert found is not None and found.origin is not None
        text = torch.frombuffer(bytearray(Path(found.origin).read_bytes()), dtype=torch.uint8).long()
        for number, block in enumerate(text.split(BLOCK)):
            part = {7: "val", 8: "test", 9: "test"}.get(number % 10, "train")
            if len(block) >= LENGTH:
                cut = block.unfold(0, LENGTH, LENGTH // 2 if part == "train" else LENGTH)
                parts[part].append((cut, torch.full((len(cut),), label)))
    return {name: (torch.cat([x for x, _ in some]), torch.cat([y for _, y in some])) for name, some in parts.items()}


KINDS = {
    "bytes": (Characters, lambda x: x, 0.002, 6),
    "features": (perceptron, counts, 0.001, 6),
    "bytes, counted": (counting, lambda x: x, 0.001, 3),
}
"""Network, what it sees of a piece, learning rate, epochs of LEARN out of twelve."""


def run(folder: Path, job: tuple[str, int, str]) -> None:
    """One sequence of five tasks of two modules, in one thread; leaves its scores in a file."""
    from lightning.pytorch import Trainer

    import lightning_cf as cf

    kind, seed, variant = job
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    make, see, lr, epochs = KINDS[kind]

    def loader(part: str, classes: tuple[int, int]) -> DataLoader:
        x, y = pieces()[part]
        chosen = torch.isin(y, torch.tensor(classes))
        train = part == "train"
        return DataLoader(TensorDataset(see(x[chosen]), y[chosen]), 64, shuffle=train, drop_last=train)

    pairs = [(i, i + 1) for i in range(0, 10, 2)]
    tasks = [
        cf.Task(" ".join(MODULES[c] for c in pair), {part: loader(part, pair) for part in pieces()}, classes=pair)
        for pair in pairs
    ]
    chosen = cf.TaskInferenceCallback("lda", budget=int(variant)) if variant.isdecimal() else variant
    rest = {"method": "joint", "masking": cf.MaskedGradientCallback(mask_outputs=False)}
    torch.manual_seed(seed)
    name = "-".join(map(str, job))
    result = cf.SequentialTaskRunner(
        cf.Classifier(make(), optimizer=partial(torch.optim.Adam, lr=lr)),
        tasks,
        trainer=partial(Trainer, **QUIET),
        epochs=epochs,
        invariance_epochs=12 - epochs,
        **(rest if variant == "joint" else {"task_inference": chosen}),
        seed=seed,
        root=folder / name,
    ).run()
    document = result.as_dict(seed=seed, config={})
    keys = ("average_accuracy", "forgetting", "task_inference")
    (folder / f"{name}.json").write_text(json.dumps({key: document[key] for key in keys}))


def main() -> None:
    parser = ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the network that counts")
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    folder = options.runs / "text"
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [
        (kind, seed, variant) for kind in KINDS for variant in variants_of(kind) for seed in seeds_of(options, kind)
    ]
    missing = [job for job in jobs if not (folder / f"{'-'.join(map(str, job))}.json").exists()]
    if missing:
        with get_context("spawn").Pool(options.processes) as pool:
            for done, _ in enumerate(pool.imap_unordered(partial(run, folder), missing), 1):
                print(f"\rtext: {done} of {len(missing)} runs", end="", flush=True)
        print()
    write_section("text", "\n\n".join([caption(), *(table(options, folder, kind) for kind in KINDS)]))


def caption() -> str:
    sizes = ", ".join(f"{len(y)} {part}" for part, (_, y) in pieces().items())
    return f"Python {platform.python_version()}; pieces of {LENGTH} bytes: {sizes}."


def variants_of(kind: str) -> tuple[str, ...]:
    return (*map(str, BUDGETS), "joint") if kind == "bytes, counted" else VARIANTS


def seeds_of(options: Namespace, kind: str) -> list[int]:
    return options.seeds if kind == "bytes, counted" else options.seeds[:1]


def table(options: Namespace, folder: Path, kind: str) -> str:
    """What each strategy reached on one kind of input."""
    rows = []
    for variant in variants_of(kind):
        names = [f"{'-'.join(map(str, (kind, seed, variant)))}.json" for seed in seeds_of(options, kind)]
        found = [json.loads((folder / name).read_text()) for name in names]
        for name in found[0]["task_inference"]:
            told = [f["task_inference"][name] for f in found]
            joint = variant == "joint"
            rows.append(
                [
                    kind,
                    "joint training over all outputs" if joint else f"`{name}`",
                    percent([f["average_accuracy"] for f in found]),
                    percent([t["task_incremental_accuracy"] for t in told]),
                    percent([t["average_accuracy"] for t in told]),
                    percent([f["forgetting"] for f in found]),
                    "" if joint else f"{mean(t['none_auroc_mean'] for t in told):.3f}",
                    "0" if joint else f"{mean(t['stored_floats'] for t in told):.0f}",
                ]
            )
    head = ["input", "strategy", "task-incremental %", "with the strategy", "class-incremental %", "forgetting"]
    return markdown([*head, "AUROC of none", "floats kept"], rows)


if __name__ == "__main__":
    main()
