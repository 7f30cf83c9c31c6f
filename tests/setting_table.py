"""The table in ``docs/your-project.md``, as the tests that ran wrote it."""

from pathlib import Path

PATH = Path(__file__).parent.parent / "docs" / "your-project.md"
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->"


def row(setting, refusal=None):
    """What the documentation says of a setting: kind, name, whether it works."""
    found = f"refused: {refusal}" if refusal else setting.note or "works"
    return [setting.group, setting.name, found.replace("|", "\\|")]


def documented(name):
    """The row that the documentation has, or None."""
    for line in _table().splitlines()[2:]:
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if cells[1] == name:
            return cells
    return None


def write(rows):
    """Puts the rows in the table's place."""
    lines = ["| kind | setting | |", "| --- | --- | --- |", *(f"| {' | '.join(cells)} |" for cells in rows)]
    PATH.write_text(PATH.read_text().replace(_table(), "\n".join(lines) + "\n"))


def _table():
    return PATH.read_text().split(BEGIN)[1].split(END)[0]
