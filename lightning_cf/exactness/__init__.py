"""Whether exact isolation holds: checked before training on random claims, probed at every claim.

Begin with :mod:`lightning_cf.exactness.check`; the probe itself is :mod:`lightning_cf.exactness.probe`.
"""

from lightning_cf.exactness.check import check_exact

__all__ = ["check_exact"]
