"""What a task's partition found, on disk: JSON and arrays that numpy reads without this package.

Begin with :mod:`lightning_cf.records.record`.
"""

from lightning_cf.records.record import PartitionRecord

__all__ = ["PartitionRecord"]
