"""Full disks, folders that cannot be written, files in the way: which file, which folder, how much."""

import errno
import os
import resource
from collections import namedtuple
from contextlib import contextmanager

import pytest
from lightning.pytorch import Callback
from runs import pair, run_of

from lightning_cf import ContinualError, SequentialTaskRunner
from lightning_cf.records.folders import TaskFolders
from lightning_cf.sequence import run_folder
from lightning_cf.sequence.run_lock import SoftFileLease
from lightning_cf.utilities.files import write_atomically, write_bytes

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*no claim within the budget", "ignore:You passed in a `val_dataloader`"
)

Usage = namedtuple("Usage", ["total", "used", "free"])


class Never(Callback):
    def on_train_start(self, trainer, pl_module):
        raise AssertionError("trained before the error")


@contextmanager
def files_up_to(size):
    """No file grows beyond a size: the system's own limit, which the superuser obeys too."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_up_names_the_state_and_the_run_goes_on_later(tmp_path, monkeypatch):
    whole = run_of(tmp_path / "whole").run()
    calls, sync = [], os.fsync

    def full(descriptor):
        if "state.pt" in os.readlink(f"/proc/self/fd/{descriptor}"):
            calls.append(descriptor)
            if len(calls) == 4:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ContinualError, match=r"state\.pt cannot be written: the disk is full\. It needs .* free"):
        run_of(tmp_path / "run").run()
    monkeypatch.undo()
    assert not list((tmp_path / "run").glob("*.partial"))
    assert run_of(tmp_path / "run").run().weights_sha256 == whole.weights_sha256


@pytest.mark.parametrize(
    ("step", "owner", "words"),
    [
        ("keep", SequentialTaskRunner, ["checkpoint.ckpt cannot be written", "It needs"]),
        ("write", TaskFolders, ["partition-0/0_body.0", ".npy cannot be written"]),
    ],
)
def test_a_file_that_cannot_grow_is_named(tmp_path, monkeypatch, step, owner, words):
    original = getattr(owner, step)

    def limited(*arguments):
        with files_up_to(100):
            original(*arguments)

    monkeypatch.setattr(owner, step, limited)
    with pytest.raises(ContinualError) as error:
        run_of(tmp_path).run()
    assert all(word in str(error.value) for word in [*words, str(tmp_path)]), error.value


@pytest.mark.parametrize("size", [0, 10])
def test_a_text_is_there_whole_or_not_at_all(tmp_path, size):
    write_atomically(tmp_path / "a.json", "before")
    with files_up_to(size), pytest.raises(ContinualError, match=r"a\.json cannot be written"):
        write_bytes(tmp_path / "a.json", b"x" * 100)
    assert (tmp_path / "a.json").read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("in_the_way", "root", "words"),
    [
        ("run", "run", ["{0}/run is a file, where a folder is needed"]),
        ("run", "run/deeper/still", ["{0}/run is a file, where a folder is needed"]),
        ("run/tasks", "run", ["{0}/run/tasks is a file, where a folder is needed"]),
        ("run/tasks/00-a", "run", ["{0}/run/tasks/00-a is a file, where a folder is needed"]),
        (None, "x" * 300, ["the name is too long"]),
    ],
)
def test_what_is_in_the_way_is_named_before_training(tmp_path, in_the_way, root, words):
    if in_the_way is not None:
        path = tmp_path / in_the_way
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("in the way")
    with pytest.raises(ContinualError) as error:
        run_of(tmp_path / root, callbacks=[Never()]).run()
    assert all(word.format(tmp_path) in str(error.value) for word in words), error.value


@pytest.mark.parametrize("name", ["run.lock", "state.pt", "settings.json", "tasks/00-a/partition.json"])
def test_a_folder_in_a_file_s_place_is_named(tmp_path, name):
    (tmp_path / name / "something").mkdir(parents=True)
    with pytest.raises(ContinualError) as error:
        run_of(tmp_path).run()
    assert str(tmp_path / name) in str(error.value)


def read_only(*arguments, **options):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def test_a_folder_that_is_read_only_is_refused_unless_the_run_is_over(tmp_path, monkeypatch):
    whole = run_of(tmp_path / "over").run()
    run = run_of(tmp_path / "half")
    run.start()
    run.phase("baseline", run.score)
    run.lock.release()
    monkeypatch.setattr(SoftFileLease, "acquire", read_only)
    with pytest.raises(ContinualError, match=r"run\.lock cannot be written: .* is read-only for this user"):
        run_of(tmp_path / "half", callbacks=[Never()]).run()
    for name in ("replace", "fsync", "link"):
        monkeypatch.setattr(os, name, read_only)
    assert run_of(tmp_path / "over").run().weights_sha256 == whole.weights_sha256


def test_room_is_asked_for_before_training(tmp_path, monkeypatch):
    run_of(tmp_path / "over", sequence=pair()[:1]).run()
    monkeypatch.setattr(run_folder, "disk_usage", lambda path: Usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(ContinualError, match=r"has 1\.0 kB free, but the run needs 1\.8 kB: .* 5|has 1\.0 kB free"):
        run_of(tmp_path / "run", callbacks=[Never()]).run()
    run_of(tmp_path / "over", sequence=pair()[:1]).run()  # which needs none
