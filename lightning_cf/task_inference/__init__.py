"""Which task is this input? Strategies, what they keep of each task, and predictions without a task's name."""

from lightning_cf.task_inference.combined import STRATEGIES, register
from lightning_cf.task_inference.inference import Inferred, Known, Prediction, TaskInference, check_strategies
from lightning_cf.task_inference.readout import Readout, View, read
from lightning_cf.task_inference.sites import Sites
from lightning_cf.task_inference.strategies import Strategy

__all__ = [
    "STRATEGIES",
    "Inferred",
    "Known",
    "Prediction",
    "Readout",
    "Sites",
    "Strategy",
    "TaskInference",
    "View",
    "check_strategies",
    "read",
    "register",
]
