"""The command line, run in this process."""

import multiprocessing
import os
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import jaxtyping
import torch
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from matplotlib.figure import Figure

from lightning_cf.cli.main import main


def here(monkeypatch, capsys, *arguments, drawn=False):
    """The command in this process: exit status and what it printed.

    Pictures are made, and drawn only where asked for: that takes as long as all the rest of a small run.
    """
    monkeypatch.setattr(sys, "argv", ["lightning-cf", *arguments])
    quicker = patch.object(Hydra, "get_mode", _mode)
    with jaxtyping_disabled(), quicker, nullcontext() if drawn else patch.object(Figure, "savefig", _sketch):
        try:
            main()
            status = 0
        except SystemExit as error:
            status = error.code
    return status, *capsys.readouterr()


_get_mode = Hydra.get_mode


def _mode(hydra, config_name, overrides):
    """Hydra composes all of a configuration once more only to see whether it sweeps, which few options can lead to."""
    if any(word in override for override in overrides for word in ("hydra", "hparams_search", "experiment")):
        return _get_mode(hydra, config_name, overrides)
    return None


FORK = multiprocessing.get_context("fork")


def forked(*arguments):
    """The command in a process that need not import anything anew, in a test of ``one_thread``."""
    assert torch.get_num_threads() == 1, "pytest.mark.usefixtures('one_thread')"
    process = FORK.Process(target=_command, args=arguments)
    process.start()
    return process


def _command(*arguments):
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    GlobalHydra.instance().clear()  # a sweep has it as well
    sys.argv = ["lightning-cf", *arguments]
    with jaxtyping_disabled(), patch.object(Hydra, "get_mode", _mode), patch.object(Figure, "savefig", _sketch):
        main()


@contextmanager
def jaxtyping_disabled():
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def _sketch(figure, path, **options):
    Path(path).write_bytes(b"\x89PNG")
