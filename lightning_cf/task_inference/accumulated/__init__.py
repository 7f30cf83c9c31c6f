"""One linear classifier over all classes of all tasks, in closed form, from sums that each task adds to.

Begin with :mod:`lightning_cf.task_inference.accumulated.strategy`; ``sums`` is what is kept, ``closed_form`` what is
solved.
"""

from lightning_cf.task_inference.accumulated.strategy import Accumulated
from lightning_cf.task_inference.accumulated.sums import Sums

__all__ = ["Accumulated", "Sums"]
