"""What the benchmarks share: runs of the command line that are taken up again, and tables in README.md."""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

HERE = Path(__file__).parent

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
"""Keywords of a Trainer that runs among many others."""


def options_parser(seeds: Sequence[int] = (0, 1, 2)) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data-dir", required=True, help="folder that holds MNIST/raw")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(seeds))
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument(
        "--choose", action="store_true", help="compare options on validation data instead, where it can"
    )
    return parser


def arguments(seeds: Sequence[int] = (0, 1, 2), images: int | None = None) -> argparse.Namespace:
    """The options of a benchmark of many runs.

    Args:
        seeds: where none are given.
        images: how many each run trains on where nobody says, for a benchmark at reduced size.
    """
    parser = options_parser(seeds)
    parser.add_argument("--processes", type=int, default=2, help="runs at the same time, where a benchmark can")
    if images is not None:
        parser.add_argument(
            "--images", type=int, default=images, help="of training; fewer to try: tables are replaced as well"
        )
    return parser.parse_args()


def run_all(options: argparse.Namespace, jobs: dict[str, list[str]]) -> dict[str, dict]:
    """The results of runs of the command line by name, some at the same time, in one thread each.

    A run whose result is there is not run again.
    """
    with ThreadPool(options.processes) as pool:
        found = pool.starmap(partial(_run, options.runs), jobs.items())
    return dict(zip(jobs, found, strict=True))


def run_methods(
    options: argparse.Namespace, name: str, methods: dict[str, list[str]], common: list[str]
) -> dict[str, list[dict]]:
    """The results of methods of the command line, one for each seed.

    Args:
        options: with the seeds.
        name: of the benchmark, in front of its runs' names.
        methods: what each overrides.
        common: what all of them override.
    """
    jobs = {
        f"{name}-{slug(method)}-{seed}": [*common, f"seed={seed}", *overrides]
        for seed in options.seeds
        for method, overrides in methods.items()
    }
    found = run_all(options, jobs)
    return {method: [found[f"{name}-{slug(method)}-{seed}"] for seed in options.seeds] for method in methods}


def slug(method: str) -> str:
    """A method's name in those of its runs."""
    return method.replace(", ", "-").replace(" ", "-").replace("=", "-")


def _run(runs: Path, name: str, overrides: list[str]) -> dict:
    folder = runs / name
    if not (folder / "result.json").exists():
        line = [sys.executable, "-m", "lightning_cf", f"run={folder}", "compare=false", *overrides]
        done = subprocess.run(
            line, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(line)}\n{done.stderr}")
        print(name, flush=True)
    return json.loads((folder / "result.json").read_text())


def percent(values: list[float]) -> str:
    """Mean and standard deviation in percent; a single value has none."""
    mean = f"{100 * statistics.mean(values):.2f}"
    return f"{mean} ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else mean


def write_section(name: str, text: str) -> None:
    """Prints a section and puts it between its marks in README.md."""
    print(text)
    readme = HERE / "README.md"
    content = readme.read_text()
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, rest = content.split(start)
    after = rest.split(end)[1]
    readme.write_text(f"{before}{start}{text}\n{end}{after}")


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
