"""Sequential tasks without forgetting, for PyTorch Lightning."""

from lightning_cf.callbacks import InvarianceCallback, MaskedGradientCallback, PartitionCallback
from lightning_cf.errors import CapacityError, ContinualError, LeakError, StructureError
from lightning_cf.ledger import NeuronLedger
from lightning_cf.models import Classifier
from lightning_cf.module import ContinualModule
from lightning_cf.perturbation import Ablate, Noise, Resample
from lightning_cf.result import Result
from lightning_cf.runner import SequentialTaskRunner
from lightning_cf.tasks import Task

__all__ = [
    "Ablate",
    "CapacityError",
    "Classifier",
    "ContinualError",
    "ContinualModule",
    "InvarianceCallback",
    "LeakError",
    "MaskedGradientCallback",
    "NeuronLedger",
    "Noise",
    "PartitionCallback",
    "Resample",
    "Result",
    "SequentialTaskRunner",
    "StructureError",
    "Task",
]
