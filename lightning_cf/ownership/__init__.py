"""Who owns which unit, and what follows from it: what may move, what is zero, what is normalised with what.

Begin with :mod:`lightning_cf.ownership.ledger`, who owns what; ``masks`` is what follows for entries of tensors,
``freezing`` what holds them still, ``owner_aware_norms`` what normalises by owners (``nested_norms`` is its
mathematics).
"""

from lightning_cf.ownership.freezing import Freezer
from lightning_cf.ownership.ledger import Isolation, NeuronLedger
from lightning_cf.ownership.levels import FREE
from lightning_cf.ownership.phases import Phase

__all__ = ["FREE", "Freezer", "Isolation", "NeuronLedger", "Phase"]
