"""SIGTERM and SIGINT end a command at any moment, with the status that a shell gives: 128 and the signal's number."""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(SystemExit):
    """A signal asked the command to end. What does not know it lets it through, as it would ``sys.exit``."""

    def __init__(self, number: int) -> None:
        self.status = 128 + number
        super().__init__(self.status)
        self.signal = signal.Signals(number).name
        self.folder = ""
        """Of the run or the sweep that goes on when it is started again; empty where none was begun."""


_active = False
_received: int | None = None


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """A whole command: what :class:`Stopped` interrupts says how to go on, and ends with the signal's status."""
    if _active:  # within a command
        yield
        return
    try:
        with stoppable():
            yield
    except Stopped as stopped:
        _end(stopped)


@contextmanager
def going_on_in(folder: Path) -> Iterator[None]:
    """Whatever :class:`Stopped` interrupts meanwhile goes on in this folder when it is started again."""
    try:
        yield
    except Stopped as stopped:
        stopped.folder = str(folder)
        raise


def _end(stopped: Stopped) -> NoReturn:
    others = [argument for argument in sys.argv[1:] if not argument.startswith("run=")]
    # Of several processes the first tells, and of a sweep's job the sweep.
    if os.environ.get("LOCAL_RANK", "0") == "0" and "hydra.mode=RUN" not in others:
        folder = stopped.folder
        quoted = folder if re.fullmatch(r"[\w./-]*", folder) else f"'{folder}'"
        again = shlex.join(["lightning-cf", *([f"run={quoted}"] if quoted else []), *others])
        after = "goes on after the last finished phase" if folder else "starts it again"
        print(f"lightning-cf: stopped by {stopped.signal}; {again} {after}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    distributed = sys.modules.get("torch.distributed")
    grouped = distributed is not None and distributed.is_available() and distributed.is_initialized()
    if grouped and distributed.get_world_size() > 1:  # type: ignore[union-attr]
        os._exit(stopped.status)  # the others were ended, and nobody would answer what torch may ask them at its end
    sys.exit(stopped.status)


@contextmanager
def stoppable() -> Iterator[None]:
    """Meanwhile SIGTERM and SIGINT raise :class:`Stopped` in the main thread, the first time that one comes.

    Those that follow are left alone: a terminal sends SIGINT to a command and its children, which then get SIGTERM from
    the command too, and what they do to end must not be cut short. A signal that is ignored, as ``nohup`` has it,
    stays so.
    """
    global _active, _received
    if threading.current_thread() is not threading.main_thread() or _active:
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    _active, _received = True, None
    take_signals()
    try:
        yield
    finally:
        _active = False
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def take_signals() -> None:
    """Sets the handlers again, for Lightning puts its own in their place; nothing outside of :func:`stoppable`.

    Lightning's waits for the end of a batch, and on several processes speaks with the others first, who may be gone.
    """
    if _active and threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _stop)


def check_stopped() -> None:
    """Raises :class:`Stopped` if a signal came, also where something swallowed what it raised."""
    if _active and _received is not None:
        raise Stopped(_received)


def _stop(number: int, frame: FrameType | None) -> None:
    global _received
    if _received is None:
        _received = number
        raise Stopped(number)
