"""Multirun: each job in a process of its own, and one table of all of them at the end."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from lightning_cf.errors import ContinualError
from lightning_cf.reporting.tables import table
from lightning_cf.utilities.files import read_json, write_atomically, write_json

RANK_VARIABLES = (
    "LOCAL_RANK",
    "RANK",
    "NODE_RANK",
    "GROUP_RANK",
    "WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "PL_GLOBAL_SEED",
)
"""What says which of several processes this one is."""

GRACE = 20.0
"""Seconds that a job has to end, once the sweep is to."""


def run_job(folder: Path, metric: str) -> float:
    """Runs the current job of a multirun as a single run in a child process, and waits for it.

    Distributed jobs leave rank variables behind, which would make the next job of the same process train on part of
    its data; so none of them is inherited.

    Args:
        folder: the job's own.
        metric: a number that ``result.json`` holds, by name.

    Returns:
        that number; NaN if the job failed.

    Raises:
        ContinualError: if the result has no such number.
    """
    config = HydraConfig.get()
    command = [sys.executable, "-m", "lightning_cf"]
    command += [f"--config-dir={s.path}" for s in config.runtime.config_sources if s.provider == "command-line"]
    overrides = [override for override in config.overrides.task if not override.startswith("run=")]
    environment = {key: value for key, value in os.environ.items() if key not in RANK_VARIABLES}
    # A configuration that asks for a multirun, such as a search, is one job here.
    command += [*overrides, f"run='{folder}'", "hydra.mode=RUN"]
    status = _status(command, environment)
    if status > 128:
        print(f"lightning-cf: job {folder.name} was stopped by {_signal(status)}; the sweep goes on", file=sys.stderr)
    write_json(folder / "job.json", {"overrides": overrides, "status": status})
    if status != 0:
        return math.nan
    value = read_json(folder / "result.json").get(metric)
    if not isinstance(value, (int, float)):
        raise ContinualError(f"lightning-cf: optimized_metric={metric!r} is no number in {folder / 'result.json'}.")
    return value


def _status(command: list[str], environment: dict[str, str]) -> int:
    """What a command ends with, as a shell has it; it does not outlive this process's own end."""
    with subprocess.Popen(command, env=environment) as process:
        try:
            status = process.wait()
        except BaseException:
            process.terminate()
            try:
                process.wait(timeout=GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
            raise
    return status if status >= 0 else 128 - status


def _signal(status: int) -> str:
    try:
        return signal.Signals(status - 128).name
    except ValueError:
        return f"status {status}"


class SweepTable(Callback):
    """Prints the table of all jobs when a multirun is over, and writes it to ``sweep.json``."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Gathers what each job left; exits with status 1 if one failed."""
        root = Path(config.hydra.sweep.dir)
        folders = sorted(
            (path.parent for path in root.glob("*/job.json")), key=lambda path: (len(path.name), path.name)
        )
        jobs = [_job(folder) for folder in folders]
        write_atomically(root / "sweep.json", json.dumps(jobs, indent=2))
        rows = [
            [
                job["job"],
                " ".join(job["overrides"]),
                *(f"{job[key]:.4f}" if key in job else "failed" for key in ("average_accuracy", "forgetting")),
                *(f"{value:.2f}" if value is not None else "" for value in [job.get("free")]),
            ]
            for job in jobs
        ]
        print(table(["job", "overrides", "average accuracy", "forgetting", "free at the end"], rows))
        print(f"{root}: sweep.json")
        if any(job["status"] for job in jobs):
            sys.exit(1)


def _job(folder: Path) -> dict[str, Any]:
    """What a job left; one whose files cannot be read counts as failed."""
    job: dict[str, Any] = {"job": folder.name, "overrides": [], "status": 1}
    try:
        job |= read_json(folder / "job.json")
        if job["status"] == 0:
            result = read_json(folder / "result.json")
            kept = ("average_accuracy", "forgetting", "backward_transfer", "weights_sha256")
            job |= {key: result[key] for key in kept}
            free = [shares[-1] for shares in result["capacity"].values()]
            job["free"] = sum(free) / len(free) if free else None
    except (ContinualError, KeyError) as error:
        job |= {"status": job["status"] or 1, "error": str(error)}
    return job
