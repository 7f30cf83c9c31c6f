"""What a network consists of: its units, which weights compute and which read them, and how it is run.

Knows no tasks and no owners. Begin with :mod:`lightning_cf.network.structure`, what a trace finds; how it is found lies
in :mod:`lightning_cf.network.tracing`.
"""

from lightning_cf.network.forward import Forward
from lightning_cf.network.structure import Entries, Structure, UnitGroup
from lightning_cf.network.tracing.trace import trace

__all__ = ["Entries", "Forward", "Structure", "UnitGroup", "trace"]
