"""The callbacks."""

from lightning_cf.callbacks.invariance import InvarianceCallback
from lightning_cf.callbacks.masked_gradient import MaskedGradientCallback
from lightning_cf.callbacks.partition import PartitionCallback
from lightning_cf.callbacks.task_inference import TaskInferenceCallback

__all__ = ["InvarianceCallback", "MaskedGradientCallback", "PartitionCallback", "TaskInferenceCallback"]
