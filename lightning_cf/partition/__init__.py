"""Which units carry a task: similarity, clusters, what may be claimed, and folding what is not into what is.

Begin with :mod:`lightning_cf.partition.claim`, the partition of one task on a live network. The mathematics stand alone
in ``similarity``, ``clusters`` and ``regression``.
"""

from lightning_cf.partition.clusters import Partition, partition, partition_into
from lightning_cf.partition.options import PartitionOptions
from lightning_cf.partition.outcome import GroupOutcome, Outcome

__all__ = ["GroupOutcome", "Outcome", "Partition", "PartitionOptions", "partition", "partition_into"]
