"""What a task's partition found, on disk: JSON and arrays that numpy reads without this package.

Begin with :mod:`lightning_cf.records.record`; ``folders`` writes one a task while a module is trained.
"""

from lightning_cf.records.record import PartitionRecord

__all__ = ["PartitionRecord"]
