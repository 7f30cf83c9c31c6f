"""Kills at random moments: every phase, and between the writes of every file; resumed, a run ends bitwise the same."""

import multiprocessing
import os
import random
import signal
from functools import wraps

import pytest
import torch
from lightning.pytorch import Callback
from runs import run_of

from lightning_cf import SequentialTaskRunner

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings(
        "ignore:.*no claim within the budget", "ignore:You passed in a `val_dataloader`", "ignore:.*fork"
    ),
]

FORK = multiprocessing.get_context("fork")
KILLS = 14


class Steps(Callback):
    """Tells of training steps."""

    def __init__(self, happens):
        self.happens = happens

    def __deepcopy__(self, memo):
        return self

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.happens("step")

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        self.happens("zero_grad")


def watched(happens, monkeypatch):
    """Tells of the beginning and end of each phase, of training steps, and before and after each file is written."""
    phase = SequentialTaskRunner.phase
    now = ["start"]

    def told(self, name, step):
        now[0] = name
        happens(f"{name}: before")

        def whole():
            step()
            happens(f"{name}: over, not stored")

        phase(self, name, whole)
        happens(f"{name}: stored")

    monkeypatch.setattr(SequentialTaskRunner, "phase", told)
    for name in ("replace", "link", "fsync"):
        call = getattr(os, name)

        @wraps(call)
        def wrapped(*arguments, call=call, name=name, **options):
            happens(f"{now[0]}: {name} before")
            result = call(*arguments, **options)
            happens(f"{now[0]}: {name} after")
            return result

        monkeypatch.setattr(os, name, wrapped)
    return Steps(lambda what: happens(f"{now[0]}: {what}"))


def killed(folder, moment, **options):
    """A run that ends at a moment, counted in events; in this process's child."""
    count = [0]

    def happens(what):
        count[0] += 1
        if count[0] == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        run_of(folder, callbacks=[watched(happens, patch)], **options).run()


def events(folder, **options):
    """What happens in a run that nobody disturbs, and its result."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        result = run_of(folder, callbacks=[watched(seen.append, patch)], **options).run()
    return seen, result


def kill(folder, moment, **options):
    process = FORK.Process(target=killed, args=(folder, moment), kwargs=options)
    process.start()
    process.join()
    return process.exitcode


@pytest.mark.parametrize("options", [{"isolation": "exact"}, {"isolation": "perturb"}], ids=["exact", "perturb"])
def test_a_run_killed_in_any_phase_or_write_ends_bitwise_the_same(tmp_path, options):
    seen, whole = events(tmp_path / "whole", **options)
    phases = list(dict.fromkeys(what.partition(":")[0] for what in seen))
    assert len(phases) == 10  # start, baseline and four for each of two tasks
    chance = random.Random(15)
    # One moment within each phase, others anywhere, and each side of the moment when a state is replaced.
    moments = [chance.choice([i for i, what in enumerate(seen, 1) if what.startswith(f"{phase}:")]) for phase in phases]
    if options["isolation"] == "exact":
        moments += [
            i for i, what in enumerate(seen, 1) if what.startswith("invariance a: replace") or ": link" in what
        ][:6]
        moments += chance.sample(range(1, len(seen)), max(0, KILLS - len(moments)))
    assert len(moments) >= 10
    for moment in moments:
        folder = tmp_path / str(moment)
        assert kill(folder, moment, **options) == -signal.SIGKILL, seen[moment - 1]
        again = run_of(folder, **options).run()
        assert again.weights_sha256 == whole.weights_sha256, seen[moment - 1]
        assert torch.equal(again.accuracy.matrix, whole.accuracy.matrix), seen[moment - 1]
        assert again.stages == whole.stages
        assert again.partition == whole.partition
        assert not list(folder.rglob("*.partial"))


def test_a_run_killed_again_and_again_ends_bitwise_the_same(tmp_path):
    seen, whole = events(tmp_path / "whole")
    chance, kills = random.Random(16), 0
    # A phase has so many events at most: the next start gets beyond it sooner or later.
    longest = max(sum(w.startswith(f"{p}:") for w in seen) for p in {w.partition(":")[0] for w in seen})
    for _ in range(60):
        status = kill(tmp_path / "run", chance.randrange(5, 2 * longest))
        if status == 0:
            break
        assert status == -signal.SIGKILL
        kills += 1
    assert kills >= 10
    again = run_of(tmp_path / "run").run()
    assert again.weights_sha256 == whole.weights_sha256
    assert torch.equal(again.accuracy.matrix, whole.accuracy.matrix)
