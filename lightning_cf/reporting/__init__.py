"""Tables and pictures of what a run found, for people.

Begin with :mod:`lightning_cf.reporting.tables`; ``result_pictures`` draws scores, ``unit_pictures`` partitions.
"""

from lightning_cf.reporting.result_pictures import write_pictures
from lightning_cf.reporting.tables import print_summary
from lightning_cf.reporting.unit_pictures import write_unit_pictures

__all__ = ["print_summary", "write_pictures", "write_unit_pictures"]
