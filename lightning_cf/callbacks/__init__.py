"""The three callbacks."""

from lightning_cf.callbacks.invariance import InvarianceCallback
from lightning_cf.callbacks.masked_gradient import MaskedGradientCallback
from lightning_cf.callbacks.partition import PartitionCallback

__all__ = ["InvarianceCallback", "MaskedGradientCallback", "PartitionCallback"]
