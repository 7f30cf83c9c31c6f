"""Split-MNIST at reduced size, many runs at once: MLP 784-200-200, eight epochs a task."""

import json
import logging
import multiprocessing
import statistics
import warnings
from argparse import Namespace
from functools import cache, partial
from pathlib import Path

import torch
from common import QUIET

EPOCHS = 8
IMAGES = 5000

Job = dict[str, object]
"""What makes a run different: isolation, measure, threshold, fold, reinitialise, invariance epochs, perturbation,
subspace, dimensions, seed."""


def run_all(options: Namespace, name: str, jobs: list[Job]) -> list[Job]:
    """Each job with its scores; those that were run before are read from their files."""
    folder = options.runs / (name if options.images == IMAGES else f"{name}-{options.images}")
    folder.mkdir(parents=True, exist_ok=True)
    missing = [job for job in jobs if not _path(folder, job).exists()]
    if missing:
        with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
            for done, _ in enumerate(pool.imap_unordered(partial(_run, folder, options), missing), 1):
                print(f"\r{name}: {done} of {len(missing)} runs", end="", flush=True)
        print()
    return [{**job, **json.loads(_path(folder, job).read_text())} for job in jobs]


def _path(folder: Path, job: Job) -> Path:
    return folder / f"{'-'.join(str(value).replace('.', '_') for value in job.values())}.json"


def _run(folder: Path, options: Namespace, job: Job) -> None:
    """One sequence of five tasks in one thread; leaves its scores in a file."""
    from lightning.pytorch import Trainer

    import lightning_cf as cf
    from lightning_cf.data import split_tasks
    from lightning_cf.models import MLP

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    perturbations = {
        "ablate": cf.Ablate,
        "resample": cf.Resample,
        "noise": cf.Noise,
        "rotation": cf.Rotation,
        "translation": cf.Translation,
        "shear": cf.Shear,
        "scaling": cf.Scaling,
        "mixture": partial(cf.Mixture, [cf.Ablate(), cf.Resample()]),
    }
    subspaces = {"random": cf.RandomSubspace, "learned": cf.LearnedSubspace}
    kind, perturbation = job.get("subspace"), job.get("perturbation")
    subspace = subspaces[kind](dimensions=job["dimensions"], seed=job["seed"]) if kind else None
    invariance_epochs = job["invariance epochs"]
    chosen = {name: job[name] for name in ("measure", "threshold", "fold", "reinitialise") if name in job}
    torch.manual_seed(job["seed"])
    network = MLP(shape=(1, 28, 28), classes=10, hidden=(200, 200))
    result = cf.SequentialTaskRunner(
        cf.Classifier(network, optimizer=partial(torch.optim.Adam, lr=0.002), cosine=True),
        split_tasks(_images(options.data_dir, options.images), batch_size=64),
        trainer=partial(Trainer, **QUIET),
        epochs=EPOCHS - invariance_epochs,
        invariance_epochs=invariance_epochs,
        partition=cf.PartitionCallback(**chosen),
        invariance=cf.InvarianceCallback(
            perturbation=perturbations[perturbation]() if perturbation else None, subspace=subspace
        ),
        masking=cf.MaskedGradientCallback(subspace=subspace),
        task_inference=None,
        isolation=job["isolation"],
        seed=job["seed"],
        root=folder / _path(folder, job).stem,
    ).run()
    matrix = result.accuracy.matrix
    found = {
        "average_accuracy": result.accuracy.average,
        "forgetting": result.accuracy.forgetting,
        "learned": float(matrix.diagonal()[1:].mean()),
        "partitioned": statistics.mean(stage["partitioned"] for stage in result.stages.values()),
        "free": statistics.mean(shares[-1] for shares in result.capacity.values()),
    }
    _path(folder, job).write_text(json.dumps(found))


@cache
def _images(data_dir: str, limit: int):
    from lightning_cf.data import mnist

    return mnist(data_dir, limit=limit)
