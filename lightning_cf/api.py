"""The public names, as ``lightning_cf`` gives them."""

from lightning_cf.callbacks import InvarianceCallback, MaskedGradientCallback, PartitionCallback, TaskInferenceCallback
from lightning_cf.errors import (
    CapacityError,
    ContinualError,
    ContinualWarning,
    DataWarning,
    DivergenceError,
    DivergenceWarning,
    FrozenWarning,
    LeakError,
    LedgerWarning,
    RunWarning,
    StructureError,
    StructureWarning,
)
from lightning_cf.invariance.affine import Rotation, Scaling, Shear, Translation
from lightning_cf.invariance.perturbations import Ablate, Affine, Compose, InSubspace, Mixture, Noise, Resample
from lightning_cf.learner.keeping import keep_ledger
from lightning_cf.models import Classifier
from lightning_cf.module import ContinualModule
from lightning_cf.ownership.ledger import NeuronLedger
from lightning_cf.records.record import PartitionRecord
from lightning_cf.sequence.result import Result
from lightning_cf.sequence.runner import SequentialTaskRunner
from lightning_cf.subspaces.subspace import GivenSubspace, LearnedSubspace, RandomSubspace
from lightning_cf.task_inference import Prediction
from lightning_cf.tasks.task import Task

__all__ = [
    "Ablate",
    "Affine",
    "CapacityError",
    "Classifier",
    "Compose",
    "ContinualError",
    "ContinualModule",
    "ContinualWarning",
    "DataWarning",
    "DivergenceError",
    "DivergenceWarning",
    "FrozenWarning",
    "GivenSubspace",
    "InSubspace",
    "InvarianceCallback",
    "LeakError",
    "LearnedSubspace",
    "LedgerWarning",
    "MaskedGradientCallback",
    "Mixture",
    "NeuronLedger",
    "Noise",
    "PartitionCallback",
    "PartitionRecord",
    "Prediction",
    "RandomSubspace",
    "Resample",
    "Result",
    "Rotation",
    "RunWarning",
    "Scaling",
    "SequentialTaskRunner",
    "Shear",
    "StructureError",
    "StructureWarning",
    "Task",
    "TaskInferenceCallback",
    "Translation",
    "keep_ledger",
]
