"""The user's data with a name: how it is read, what its targets are, and how a network is scored on it.

Begin with :mod:`lightning_cf.tasks.task`, then :mod:`lightning_cf.tasks.evaluation`.
"""

from lightning_cf.tasks.task import Task

__all__ = ["Task"]
