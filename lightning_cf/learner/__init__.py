"""A live LightningModule with its ledger: what the callbacks and the runner share about it, and the steps they take.

Begin with :mod:`lightning_cf.learner.state`; the steps between training phases are :mod:`lightning_cf.learner.steps`.
"""

from lightning_cf.learner.keeping import keep_ledger

__all__ = ["keep_ledger"]
