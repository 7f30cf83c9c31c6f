"""Which task is this input? Strategies, what they keep of each task, and predictions without a task's name.

Begin with :mod:`lightning_cf.task_inference.inference`; ``strategies`` is what a strategy is, ``registry``
has all of them, ``readout`` and ``sites`` are what they look at in the network.
"""

from lightning_cf.task_inference.cumulative import Cumulative
from lightning_cf.task_inference.inference import TaskInference
from lightning_cf.task_inference.known import Known
from lightning_cf.task_inference.prediction import Inferred, Prediction
from lightning_cf.task_inference.readout import Readout, View, read
from lightning_cf.task_inference.registry import STRATEGIES, check_strategies, register
from lightning_cf.task_inference.sites import Sites
from lightning_cf.task_inference.strategies import Strategy

__all__ = [
    "STRATEGIES",
    "Cumulative",
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
