"""One run a folder: a lock that names who holds it, and that a killed run does not leave behind."""

from __future__ import annotations

import os
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from weakref import WeakValueDictionary

from filelock import SoftFileLease, Timeout

from lightning_cf.errors import ContinualError, RunWarning, warn
from lightning_cf.lightning_api import SLURMEnvironment
from lightning_cf.utilities.files import read_json, write_json, writing

LEASE = 120.0
"""Seconds without a sign of life after which a run on another machine counts as dead."""

PATIENCE = 10.0
"""Seconds more that a run waits for the lock of one that may be dead."""

_HELD: WeakValueDictionary[str, RunLock] = WeakValueDictionary()
"""Locks of this process by path: one that only started may be taken over by another runner of the process."""


class RunLock:
    """Held by the first process of a run, from its start to its end.

    It is a file that exists (``filelock.SoftFileLease``), so it also works between machines that share the folder. A
    holder of this machine that is dead is known at once, also where its process number was given out again; one of
    another machine, or container, counts as dead when its file was not touched for two minutes.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "run.lock"
        self.busy = False
        self._about = folder / "run.lock.json"
        self._lease: SoftFileLease | None = None

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._lease is not None

    def acquire(self) -> None:
        """Takes the lock.

        Raises:
            ContinualError: if another run holds it; says which.
        """
        if self.held:
            return
        known = str(self.path.absolute())
        other = _HELD.get(known)
        if other is not None and not other.busy:
            other.release()
        lease = SoftFileLease(self.path, lease_duration=LEASE, heartbeat_interval=LEASE / 6, thread_local=False)
        with writing(self.path):
            try:
                lease.acquire(timeout=0.2, poll_interval=0.02)
            except Timeout as error:
                owner = lease.owner
                elsewhere = str(error) != str(Timeout(error.lock_file))  # says so of a holder that it cannot ask
                if owner is not None and not elsewhere:
                    raise self._taken(owner.pid) from None
                if owner is not None:
                    warn(
                        f"{self.path} is held by process {owner.pid} on {owner.hostname}; waiting up to"
                        f" {LEASE:.0f} seconds for a sign that it still runs.",
                        RunWarning,
                    )
                try:  # what is no lock heals by itself, and what nobody touches is taken over
                    lease.acquire(timeout=LEASE + PATIENCE, poll_interval=min(0.5, LEASE / 10))
                except Timeout:
                    raise self._taken(None if owner is None else owner.pid) from None
        self._lease = lease
        _HELD[known] = self
        with suppress(ContinualError):  # only words for the message
            write_json(self._about, _about_this_process())

    def release(self) -> None:
        """Gives the lock back so that another run may have the folder; does nothing where it is not held."""
        lease, self._lease, self.busy = self._lease, None, False
        if lease is not None:
            with suppress(OSError):
                self._about.unlink(missing_ok=True)
            lease.release()

    def check(self) -> None:
        """Raises ContinualError if another run has taken the lock over meanwhile, so that nothing of it is changed."""
        if self._lease is not None and self._lease.compromise is not None:
            raise ContinualError(
                f"{self.path} was lost ({self._lease.compromise.reason}): another run may have taken the folder over,"
                " since this one gave no sign of life. Start it again once the other one is over."
            )

    def _taken(self, pid: int | None) -> ContinualError:
        about = {}
        with suppress(ContinualError):
            about = read_json(self._about)
        number = pid if pid is not None else about.get("pid", "unknown")
        told = about.get("pid") == number
        who = f"process {number}"
        if told:
            job = f", SLURM job {about['job']}" if about.get("job") is not None else ""
            who += f" on {about['host']}, started {about['started']}{job} ({about['command']})"
        return ContinualError(
            f"The folder {self.path.parent} is in use by another run: {who}. Wait for its end, or choose another"
            f" folder. If that process is gone, remove {self.path}."
        )


def _about_this_process() -> dict[str, object]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "job": SLURMEnvironment.job_id() if SLURMEnvironment.detect() else None,
        "command": " ".join(sys.argv)[:200],
    }
