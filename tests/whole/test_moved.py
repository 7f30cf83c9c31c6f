"""Names that scripts imported before the package got folders."""

import sys
import warnings
from importlib import import_module

import pytest

import lightning_cf
from lightning_cf.learner.predicting import predict_any
from lightning_cf.moved import MOVED

BEFORE = {
    "affine": "Rotation Scaling Shear Translation",
    "callbacks": "InvarianceCallback MaskedGradientCallback PartitionCallback TaskInferenceCallback",
    "errors": "CapacityError ContinualError ContinualWarning DataWarning DivergenceError FrozenWarning LeakError",
    "ledger": "NeuronLedger",
    "models": "Classifier",
    "module": "ContinualModule",
    "perturbation": "Ablate Affine Compose InSubspace Mixture Noise Resample",
    "records": "PartitionRecord",
    "result": "Result",
    "runner": "SequentialTaskRunner",
    "state": "keep_ledger",
    "subspace": "GivenSubspace LearnedSubspace RandomSubspace",
    "task_inference": "Prediction",
    "tasks": "Task",
}
"""Public names by the module that defined them."""

OTHERS = {
    "exactness": "check_exact",
    "freezing": "Freezer",
    "metrics": "AccuracyMatrix",
    "models": "CNN MLP ResNet",
    "options": "PartitionOptions",
    "partition": "Partition partition partition_into",
    "similarity": "Similarity",
    "task_inference": "STRATEGIES register",
    "tracing": "trace",
    "unit_pictures": "similarity_picture units_picture",
}
"""Names that the documentation or the benchmarks used."""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("module", sorted({*BEFORE, *OTHERS}))
def test_names_are_found_where_they_were(module):
    for name in BEFORE.get(module, "").split():
        assert getattr(import_module(f"lightning_cf.{module}"), name) is getattr(lightning_cf, name)
    for name in OTHERS.get(module, "").split():
        assert callable(getattr(import_module(f"lightning_cf.{module}"), name)) or name == "STRATEGIES"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_name_that_went_elsewhere_is_found_too(monkeypatch):
    monkeypatch.delitem(sys.modules, "lightning_cf.inferring", raising=False)
    assert import_module("lightning_cf.inferring").predict_any is predict_any


@pytest.mark.parametrize("module", MOVED)
def test_a_former_name_warns_of_the_line_that_uses_it(module, monkeypatch):
    monkeypatch.delitem(sys.modules, f"lightning_cf.{module}", raising=False)
    with pytest.warns(DeprecationWarning, match=f"lightning_cf.{module} is lightning_cf.{MOVED[module]} now") as heard:
        import_module(f"lightning_cf.{module}")
    assert [warning.filename for warning in heard] == [__file__]


def test_nothing_of_ours_uses_a_former_name_and_no_other_name_is_found():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in lightning_cf.__all__:
            getattr(lightning_cf, name)
    for name in ("lightning_cf.nothing", "lightning_cf.ownership.affine", "other.ledger"):
        with pytest.raises(ModuleNotFoundError):
            import_module(name)
