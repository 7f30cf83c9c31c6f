"""Tables and pictures of what a run found, for people."""

from lightning_cf.reporting.tables import print_summary, write_pictures, write_unit_pictures

__all__ = ["print_summary", "write_pictures", "write_unit_pictures"]
