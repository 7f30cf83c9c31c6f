"""Many tasks, one after another: the runner, what it keeps on disk, and what it found.

Begin with :mod:`lightning_cf.sequence.runner`, which reads top to bottom as the method's own steps; ``stored_run`` is
how a run starts and goes on, ``store`` what it keeps on disk, ``identity`` and ``comparison`` tell runs apart.
"""

from lightning_cf.sequence.result import Result
from lightning_cf.sequence.runner import SequentialTaskRunner

__all__ = ["Result", "SequentialTaskRunner"]
