"""Two runs on one folder, and what kills leave of a lock."""

import json
import multiprocessing
import os
import signal
import socket
from contextlib import contextmanager, nullcontext

import pytest
from filelock import SoftFileLease
from lightning.pytorch import Callback
from runs import pair, run_of

from lightning_cf import ContinualError, RunWarning
from lightning_cf.sequence import run_lock as module
from lightning_cf.sequence.run_lock import RunLock

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no claim within the budget"),
    pytest.mark.filterwarnings("ignore:.*fork"),
]

FORK = multiprocessing.get_context("fork")


@contextmanager
def another_process(step, *arguments):
    """Runs a step in a process of its own until the block is over; the step says by its pipe that it is there."""
    here, there = FORK.Pipe()
    process = FORK.Process(target=step, args=(there, *arguments))
    process.start()
    assert here.recv() == "there"
    try:
        yield process
    finally:
        process.kill()
        process.join()


def hold(pipe, folder):
    lock = RunLock(folder)
    lock.acquire()
    pipe.send("there")
    signal.pause()


def test_a_second_run_is_refused_and_told_who_holds_the_folder(tmp_path):
    with another_process(hold, tmp_path) as other:
        with pytest.raises(ContinualError) as error:
            run_of(tmp_path).run()
        for word in (str(tmp_path), f"process {other.pid}", socket.gethostname(), "started 2", "another folder"):
            assert word in str(error.value)
        assert [path.name for path in sorted(tmp_path.iterdir())] == ["run.lock", "run.lock.json"]


def test_the_lock_of_a_killed_run_is_taken_over_at_once(tmp_path):
    with another_process(hold, tmp_path) as other:
        os.kill(other.pid, signal.SIGKILL)
        other.join()
        assert (tmp_path / "run.lock").exists()
        lock = RunLock(tmp_path)
        lock.acquire()
        assert lock.held
        lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_process_number_that_was_given_out_again_is_no_holder(tmp_path):
    with another_process(hold, tmp_path) as other:
        marker = (tmp_path / "run.lock").read_text()
    start = next(line for line in marker.splitlines() if line.startswith("start="))
    # The number of a process that lives, this one, with the start of one that does not.
    forged = marker.replace(f"pid={other.pid}", f"pid={os.getpid()}").replace(start, f"start={int(start[6:]) - 1}")
    (tmp_path / "run.lock").write_text(forged)
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.release()


@pytest.mark.parametrize("alive", [False, True])
def test_a_run_on_another_machine_counts_as_dead_when_it_gives_no_sign(tmp_path, monkeypatch, alive):
    monkeypatch.setattr(module, "LEASE", 1.0)
    holder = SoftFileLease(tmp_path / "run.lock", lease_duration=1.0, heartbeat_interval=0.3, thread_local=False)
    holder.acquire()
    record = holder._published_record()._replace(hostname="elsewhere")
    from filelock._marker import encode_marker

    with (tmp_path / "run.lock").open("r+b") as file:  # the same file, so that the heart beats on
        file.write(encode_marker(record))
        file.truncate()
    if not alive:
        holder._stop_heartbeat()
    monkeypatch.setattr(module, "PATIENCE", 0.5)
    lock = RunLock(tmp_path)
    refused = pytest.raises(ContinualError, match="in use by another run") if alive else nullcontext()
    with pytest.warns(RunWarning, match="on elsewhere; waiting up to"), refused:
        lock.acquire()
    assert lock.held is not alive
    lock.release()
    holder._stop_heartbeat()


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\xff\x00"])
def test_a_lock_that_is_none_heals(tmp_path, monkeypatch, content):
    monkeypatch.setattr(module, "PATIENCE", 3.0 if content else 1.0)
    monkeypatch.setattr(module, "LEASE", 1.0)
    (tmp_path / "run.lock").write_bytes(content)
    lock = RunLock(tmp_path)
    if content:
        lock.acquire()
        assert lock.held
        lock.release()
    else:  # an older filelock's, or one that is just being written
        with pytest.raises(ContinualError, match=r"remove .*run\.lock"):
            lock.acquire()


def test_a_lock_that_was_lost_keeps_the_run_from_writing(tmp_path):
    class Lose(Callback):
        def on_train_start(self, trainer, pl_module):
            held = run.lock._lease
            held._report_compromise(held._claim, "owner-changed", None, held.token)

    run = run_of(tmp_path, callbacks=[Lose()])
    with pytest.raises(ContinualError, match=r"run\.lock was lost \(owner-changed\)"):
        run.run()
    again = run_of(tmp_path)
    again.start()
    assert again.progress.finished == ["baseline"]
    again.lock.release()


def test_the_lock_is_given_back_at_the_end_and_after_an_error(tmp_path):
    class Fail(Callback):
        def on_train_start(self, trainer, pl_module):
            assert (tmp_path / "run.lock").exists()
            assert json.loads((tmp_path / "run.lock.json").read_text())["pid"] == os.getpid()
            with pytest.raises(ContinualError, match="in use by another run"):
                run_of(tmp_path).run()
            raise RuntimeError("failed")

    with pytest.raises(RuntimeError, match="failed"):
        run_of(tmp_path, callbacks=[Fail()]).run()
    assert not (tmp_path / "run.lock").exists()
    run_of(tmp_path, sequence=pair()).run()
    assert not (tmp_path / "run.lock").exists()


def test_a_run_that_only_started_does_not_keep_its_own_process_out(tmp_path):
    first = run_of(tmp_path)
    first.start()
    second = run_of(tmp_path)
    second.start()
    assert second.lock.held
    assert not first.lock.held
    second.lock.release()
