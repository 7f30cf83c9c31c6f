"""The table in docs/settings.md, written by the tests that ran."""

from pathlib import Path

PATH = Path(__file__).parent.parent / "docs" / "settings.md"
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->"


def row(setting):
    """What the documentation says of a setting that was tested."""
    if setting.refused is not None:
        return [setting.group, setting.name, f"refused: {setting.refused}"]
    return [setting.group, setting.name, setting.note or "works"]
