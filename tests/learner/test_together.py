"""Several processes share in what reads all of a task's data when it is sealed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from clouds import clouds

BATCH = len(next(iter(clouds("a", [0, 1]).train_dataloader()))[1])

SCRIPT = """
import os, sys
from functools import reduce
import torch
from clouds import Net, clouds
from learning import fit, three
from lightning_cf import ContinualError, TaskInferenceCallback, ContinualModule
from lightning_cf.learner.accumulating import training_of
from lightning_cf.learner.inferring import inference_of
from lightning_cf.task_inference import STRATEGIES, gathering
from lightning_cf.task_inference.accumulated import Accumulated, Sums
from lightning_cf.task_inference.accumulated.sums import unpacked
from lightning_cf.task_inference.features.base import inner
from lightning_cf.task_inference.forgetting import added_by

rank, looked, add = int(os.environ.get("LOCAL_RANK", 0)), [], Accumulated.add
what = sys.argv[1]

def counted(self, shared, seen, sites, columns):
    looked.append(len(columns))
    if what == "fails" and rank == 1 and sum(looked) > 90:
        raise ValueError("the other process is out of luck")
    return add(self, shared, seen, sites, columns)

Accumulated.add, gathering.ENOUGH = counted, 40
module = ContinualModule(Net())
sequence = [clouds(name, classes) for name, classes in (("a", [0, 1]), ("b", [7, 3]))]
if what == "own data" and rank == 1:  # each process has data of its own
    for task in sequence:
        task.train_dataloader().dataset.tensors[0].mul_(1.01)
for task in sequence:
    module.add_task(task)
for task in sequence:
    looked.clear()
    callbacks = [*three(max_claim=0.3), TaskInferenceCallback("lda")]
    try:
        fit(module, task, callbacks, 2, accelerator="cpu", devices=2, strategy="ddp")
    except ContinualError as error:
        print(f"rank {rank}: {error}", flush=True)
        sys.exit()
    print(f"rank {rank} looked at {sum(looked)} samples of {task.name}", flush=True)
inference = inference_of(module.ledger)
strategy, shared, sites = STRATEGIES["lda"], inference.shared["lda"], inference.tasks[0].sites
kept = unpacked(inner(shared, "sums"))
if rank == 0:
    parts = [unpacked(added_by(strategy, shared, sites, training_of(module, task, inference))) for task in sequence]
    alone = reduce(Sums.__add__, parts)
    print("the same:", torch.equal(kept.gram, alone.gram) and torch.equal(kept.totals, alone.totals), flush=True)
print(f"rank {rank} keeps {int(kept.gram.sum())}", flush=True)
"""


def run(what, folder):
    (folder / "script.py").write_text(SCRIPT)
    tests = Path(__file__).parents[1]
    known = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "WORLD_SIZE", "RANK")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "script.py", what],
        cwd=folder,
        env={**known, "PYTHONPATH": f"{tests}:{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def looked_at(said):
    """By task, how many samples each process looked at, the batch of its trial before the task left out."""
    found = {task: {} for task in "ab"}
    for rank, count, task in re.findall(r"rank (\d) looked at (\d+) samples of (\w)", said):
        found[task][int(rank)] = int(count) - BATCH
    return found


def test_each_process_looks_at_a_part_and_the_sums_are_bitwise_those_of_one(tmp_path):
    said = run("shares", tmp_path)
    assert "the same: True" in said
    for parts in looked_at(said).values():
        assert sum(parts.values()) == 200
        assert min(parts.values()) >= 64
    kept = re.findall(r"keeps (\d+)", said)
    assert len(kept) == 2
    assert len(set(kept)) == 1


@pytest.mark.slow
def test_where_processes_have_data_of_their_own_the_first_looks_at_all_of_its_own(tmp_path):
    assert looked_at(run("own data", tmp_path)) == {task: {0: 200, 1: 0} for task in "ab"}


@pytest.mark.slow
def test_a_process_that_fails_stops_all(tmp_path):
    assert run("fails", tmp_path).count("Process 1 failed: ValueError('the other process is out of luck')") == 2
