"""A process that waits for other nodes ends when it is asked to."""

import signal
import subprocess
import sys

import pytest

from lightning_cf.sequence.trainers import ended_at_once

WAIT = """
import sys
from datetime import timedelta
from torch.distributed import TCPStore
from lightning_cf.sequence.trainers import ended_at_once
import signal
signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background may begin deaf to it
with ended_at_once():
    print("waits", flush=True)
    TCPStore("127.0.0.1", 0, 2, is_master=True, timeout=timedelta(seconds=100))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_wait_that_runs_no_python(number):
    with subprocess.Popen([sys.executable, "-W", "ignore", "-c", WAIT], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "waits\n"
        process.send_signal(number)
        assert process.wait(60) == -number


def test_handlers_stand_afterwards_as_they_stood():
    handler = lambda *_: None  # noqa: E731
    signal.signal(signal.SIGTERM, handler)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with ended_at_once():
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) is handler
