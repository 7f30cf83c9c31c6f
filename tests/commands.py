"""The command line, run in this process."""

import sys
from contextlib import contextmanager

import jaxtyping

from lightning_cf.cli.main import main


def here(monkeypatch, capsys, *arguments):
    """The command in this process: exit status and what it printed."""
    monkeypatch.setattr(sys, "argv", ["lightning-cf", *arguments])
    with jaxtyping_disabled():
        try:
            main()
            status = 0
        except SystemExit as error:
            status = error.code
    return status, *capsys.readouterr()


@contextmanager
def jaxtyping_disabled():
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
