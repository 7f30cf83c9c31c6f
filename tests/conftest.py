"""Checks the package's annotations, shapes included, while the tests run."""

import os

import jaxtyping
import pytest
import torch
from hypothesis import settings

jaxtyping.install_import_hook("lightning_cf", "typechecking.checked")  # before anything imports the package
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of notebooks and commands: test processes side by side share the cores
settings.register_profile("tests", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("tests")


@pytest.fixture
def unchecked():
    """Turns the annotation checks off, for tests that hand over what they would refuse."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def pytest_addoption(parser):
    parser.addoption("--write-tables", action="store_true", help="write the tables in docs/ that tests check")


ROWS: dict[str, list[str]] = {}
"""What tests found, by the test: rows of ``docs/architectures.md``."""


def pytest_runtest_logreport(report):
    for name, value in report.user_properties:
        if name == "architecture":
            ROWS[value[0]] = value


def pytest_sessionfinish(session):
    if session.config.getoption("--write-tables") and not hasattr(session.config, "workerinput"):
        import architecture_table
        from architectures import ARCHITECTURES

        architecture_table.write([ROWS[a.name] for a in ARCHITECTURES if a.name in ROWS])
