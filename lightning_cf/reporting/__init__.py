"""Tables and pictures of what a run found, for people."""

from lightning_cf.reporting.result_pictures import (
    accuracy_picture,
    capacity_picture,
    forgetting_picture,
    write_pictures,
)
from lightning_cf.reporting.tables import print_summary, summary, table
from lightning_cf.reporting.unit_pictures import similarity_picture, units_picture, write_unit_pictures

__all__ = [
    "accuracy_picture",
    "capacity_picture",
    "forgetting_picture",
    "print_summary",
    "similarity_picture",
    "summary",
    "table",
    "units_picture",
    "write_pictures",
    "write_unit_pictures",
]
