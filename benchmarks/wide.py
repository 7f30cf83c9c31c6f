"""Partitions of a wide layer: seconds, and memory beyond the weights, beside the plain matrix product."""

import argparse
import json
import re
import resource
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import torch
from common import write_section
from torch import nn

from lightning_cf.exactness.probe import probe
from lightning_cf.network.tracing.trace import trace
from lightning_cf.ownership.ledger import NeuronLedger
from lightning_cf.partition.claim import Claimer
from lightning_cf.partition.clusters import TILE, partition, partition_into
from lightning_cf.partition.options import PartitionOptions
from lightning_cf.partition.similarity import Similarity

MIB = 2**20


def resident() -> int:
    """Bytes of memory that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def weights(units: int, inputs: int) -> torch.Tensor:
    """A layer as it is initialised, row after row so that no second copy is ever needed."""
    generator = torch.Generator().manual_seed(0)
    layer = torch.empty(units, inputs)
    for rows in layer.split(TILE):
        rows.uniform_(-(inputs**-0.5), inputs**-0.5, generator=generator)
    return layer


def product(layer: torch.Tensor, count: int) -> None:
    """All units with as many as are to be claimed, tile by tile, in single precision."""
    for rows in layer.split(TILE):
        for columns in layer[:count].split(TILE):
            torch.mm(rows, columns.T)


def claim(layer: torch.Tensor, count: int) -> None:
    """What PartitionCallback does: partition, fold, cut, judge, probe; in a network around the layer."""
    units, inputs = layer.shape
    network = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(units, 10))
    network[0].in_features, network[0].out_features = inputs, units
    network[0].weight, network[0].bias = nn.Parameter(layer), nn.Parameter(torch.zeros(units))
    x = torch.randn(256, inputs)
    structure = trace(network, x)
    ledger = NeuronLedger.for_structure(structure)
    ledger.reserve("first", [0, 1])
    ledger.begin("first", [0, 1])
    with torch.no_grad():
        Claimer(
            module=network,
            structure=structure,
            ledger=ledger,
            options=PartitionOptions(min_claim=count / units, max_claim=count / units),
            score=lambda: float(network(x)[:, 0].mean()),
            passes=lambda: iter([lambda: network(x)] * 4),
            keep=False,
        ).claim()
    probe(network, structure, ledger, x)


JOBS = {
    "matrix product, 5 %": lambda layer: product(layer, len(layer) // 20),
    "partition into 5 %": lambda layer: partition_into(similarity(layer), len(layer) // 20),
    "matrix product, 25 %": lambda layer: product(layer, len(layer) // 4),
    "partition into 25 %": lambda layer: partition_into(similarity(layer), len(layer) // 4),
    "components at threshold 0.5": lambda layer: partition(similarity(layer), 0.5, clusters="components"),
    "claim of 5 %: partition, fold, cut, probe": lambda layer: claim(layer, len(layer) // 20),
}


def similarity(layer: torch.Tensor) -> Similarity:
    return Similarity(layer, torch.zeros(len(layer)))


def measure(name: str, units: int, inputs: int) -> dict[str, float]:
    """Runs one job in this process; its memory is sampled, since the peak of the process may lie before it."""
    layer = weights(units, inputs)
    torch.mm(torch.ones(2, 2), torch.ones(2, 2))
    before, peak, done = resident(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        JOBS[name](layer)
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    return {"seconds": seconds, "mib": (max(peak[0], resident()) - before) / MIB}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--units", type=int, default=65_536)
    parser.add_argument("--inputs", type=int, default=4096)
    parser.add_argument("--job", choices=JOBS, help="run this one here and print what it took")
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmarks"), help="jobs found there are not run again")
    options = parser.parse_args()
    if options.job:
        print(json.dumps(measure(options.job, options.units, options.inputs)))
        return
    size = ["--units", str(options.units), "--inputs", str(options.inputs)]
    lines = [
        f"A layer of {options.units:,} units x {options.inputs:,} inputs, whose weights take"
        f" {options.units * options.inputs * 4 / MIB:.0f} MiB; {torch.get_num_threads()} threads.",
        "",
        "| | seconds | memory beyond the weights, MiB |",
        "| --- | --- | --- |",
    ]
    for name in JOBS:
        kept = options.runs / f"wide-{options.units}-{options.inputs}-{re.sub('[^a-z0-9]+', '-', name)}.json"
        if not kept.exists():
            line = [sys.executable, __file__, "--job", name, *size]
            done = subprocess.run(line, capture_output=True, text=True, check=True)
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(done.stdout.splitlines()[-1])
        found = json.loads(kept.read_text())
        lines.append(f"| {name} | {found['seconds']:.1f} | {found['mib']:.0f} |")
        print(lines[-1], flush=True)
    write_section("wide", "\n".join(lines))


if __name__ == "__main__":
    main()
