"""The whole method for a plain training loop: any optimiser, no Lightning; the callbacks are written on it.

.. code-block:: python

    import lightning_cf.functional as cf

    units = cf.trace(net, x[:16])
    ledger = cf.new_ledger(units)
    cf.check(net, units, ledger, x[:16])
    for name, train, val, columns in tasks:
        ledger.begin(name, outputs=columns)
        with cf.hold(net, units, ledger):  # LEARN: any optimiser, any loop
            fit(net, train, columns)
        cf.claim(net, units, ledger, batches=train, score=lambda: accuracy(net, val, columns))
        with cf.hold(net, units, ledger):  # INVARIANCE
            fit(net, train, columns)
        cf.seal(net, units, ledger)

``columns`` are the outputs of the network that are the task's own: train and score it on them alone, or within
:func:`show`, which masks the others. Begin with :mod:`lightning_cf.functional.phases`.
"""

from lightning_cf.functional.forgetting import forget
from lightning_cf.functional.holding import Hold, hold
from lightning_cf.functional.perturbing import perturb
from lightning_cf.functional.phases import check, claim, new_ledger, trace
from lightning_cf.functional.sealing import seal
from lightning_cf.functional.showing import show
from lightning_cf.ownership.ledger import NeuronLedger
from lightning_cf.partition.options import PartitionOptions

__all__ = [
    "Hold",
    "NeuronLedger",
    "PartitionOptions",
    "check",
    "claim",
    "forget",
    "hold",
    "new_ledger",
    "perturb",
    "seal",
    "show",
    "trace",
]
