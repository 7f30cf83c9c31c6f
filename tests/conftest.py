"""Checks the package's annotations, shapes included, while the tests run."""

import jaxtyping
import pytest
import torch
from hypothesis import settings

jaxtyping.install_import_hook("lightning_cf", "typechecking.checked")  # before anything imports the package
torch.set_num_threads(1)
settings.register_profile("tests", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("tests")


@pytest.fixture
def unchecked():
    """Turns the annotation checks off, for tests that hand over what they would refuse."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
