"""Checks the package's annotations, shapes included, while the tests run."""

import gc
import importlib.metadata
import os
import random
import signal
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
import typechecking
from hypothesis import HealthCheck, settings

PACKAGE = Path(str(find_spec("lightning_cf").origin)).parent
SHAPED = [
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    for path in sorted(PACKAGE.rglob("*.py"))
    if "from jaxtyping import" in path.read_text(encoding="utf-8")
]
"""Modules that say shapes, which nothing else checks; mypy checks the others."""

typechecking.install(SHAPED)  # before anything imports the package
importlib.metadata.entry_points = cache(importlib.metadata.entry_points)  # each Trainer looks through all packages
os.fsync = lambda descriptor: None  # no test cuts the power, and a disk takes longer than all else that writes a file
# How long an example takes says something about the machine and what else runs on it, nothing about the code.
settings.register_profile(
    "tests", deadline=None, derandomize=True, max_examples=50, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tests")


@pytest.fixture
def unchecked():
    """Turns the annotation checks off, for tests that hand over what they would refuse."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True, scope="module")
def _seeded_module():
    """What the fixtures of a module draw does not hang on the tests before them."""
    seed()


@pytest.fixture(autouse=True)
def _seeded():
    """Nor does what a test draws."""
    seed()


def seed():
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


@pytest.fixture(autouse=True, scope="module")
def _strategies_of_a_module():
    """Strategies of a module's own are known in it alone: ``task_inference="all"`` takes every one that is known."""
    yield from _strategies_put_back()


@pytest.fixture(autouse=True)
def _strategies():
    """And those of a test's own in that test alone."""
    yield from _strategies_put_back()


def _strategies_put_back():
    from lightning_cf.task_inference import STRATEGIES  # where annotations are checked by now

    before = dict(STRATEGIES)
    yield
    STRATEGIES.clear()
    STRATEGIES.update(before)


@pytest.fixture(autouse=True)
def _calls_are_counted_anew():
    typechecking.calls.clear()


@pytest.fixture(autouse=True)
def _process_groups():
    """Lightning leaves a fit's process group, and what it tells other processes of it: later tests begin without them.

    A child of a later test took itself for the first of processes that somebody else starts, and waited for them.
    """
    told = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "RANK", "WORLD_SIZE")
    before = {name: os.environ[name] for name in told if name in os.environ}
    yield
    for name in told:
        os.environ.pop(name, None)
    os.environ.update(before)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def _switches():
    """``Trainer(deterministic=True)`` and its kin turn switches of the whole process, for one test only."""
    before = {read: read() for read in SWITCHES}
    yield
    for read, write in SWITCHES.items():
        if read() != before[read]:
            write(before[read])


SWITCHES = {
    torch.are_deterministic_algorithms_enabled: torch.use_deterministic_algorithms,
    torch.get_default_dtype: torch.set_default_dtype,
    torch.get_float32_matmul_precision: torch.set_float32_matmul_precision,
    torch.is_anomaly_enabled: torch.autograd.set_detect_anomaly,
    torch.is_grad_enabled: torch.set_grad_enabled,
    torch.get_num_threads: torch.set_num_threads,
    torch.backends.mha.get_fastpath_enabled: torch.backends.mha.set_fastpath_enabled,
}


@pytest.fixture
def one_thread():
    """In a child that is forked, several threads of OpenMP would wait for ever for those that the fork left behind."""
    torch.set_num_threads(1)  # _switches puts it back


@pytest.fixture(autouse=True)
def _signal_handlers():
    """Lightning ignores SIGINT from the first Ctrl+C on: later tests hear it as before."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def pytest_addoption(parser):
    parser.addoption("--write-tables", action="store_true", help="write the tables in docs/ that tests check")
    parser.addoption("--threads", type=int, default=1, help="threads of a test process, which rounding depends on")
    parser.addoption(
        "--rounding", type=int, default=0, help="as on a machine of that number, which rounds initial weights otherwise"
    )


def pytest_configure(config):
    threads = config.getoption("--threads")
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # of notebooks and commands, too
    if config.getoption("--rounding"):
        round_otherwise(config.getoption("--rounding"))


def round_otherwise(machine):
    """Moves initial weights by a millionth, always alike: what a bound on a score must bear, as other processors round.

    Weights of child processes stay, so tests that compare with one fail.
    """
    for name in ("uniform_", "normal_", "kaiming_uniform_", "xavier_uniform_", "trunc_normal_"):
        setattr(torch.nn.init, name, partial(_moved, getattr(torch.nn.init, name), machine))


def _moved(initialise, machine, tensor, *args, **kwargs):
    initialise(tensor, *args, **kwargs)
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1000 * tensor.numel() + machine))
    with torch.no_grad():
        return tensor.mul_(1 + 1e-6 * noise.to(tensor))


def pytest_collection_finish(session):
    """What was imported and collected stays to the end: the collector need not look at it again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


ROWS: dict[str, dict[str, list[str]]] = {"architecture": {}, "setting": {}}
"""What tests found: rows of ``docs/architectures.md`` and ``docs/your-project.md`` by what they are about."""


def pytest_runtest_logreport(report):
    for name, value in report.user_properties:
        if name in ROWS:
            ROWS[name][value[0 if name == "architecture" else 1]] = value


def pytest_sessionfinish(session):
    if session.config.getoption("--write-tables") and not hasattr(session.config, "workerinput"):
        import architecture_table
        import setting_table
        from architectures import ARCHITECTURES
        from settings import SETTINGS

        for kind, table, known in (
            ("architecture", architecture_table, ARCHITECTURES),
            ("setting", setting_table, SETTINGS),
        ):
            if ROWS[kind]:
                table.write([ROWS[kind][a.name] for a in known if a.name in ROWS[kind]])
