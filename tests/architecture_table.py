"""The table in ``docs/architectures.md``: what the tests of the architectures found, a row for each."""

import re
from pathlib import Path

from lightning_cf.structure import NO_UNIT, layer_of

PATH = Path(__file__).parent.parent / "docs" / "architectures.md"
COLUMNS = ["network", "units", "exact isolation", "owned whole by the first task", "accuracy of the three tasks"]


def units(structure, module, whole):
    """What the units are, and how many: `24 channels of Conv2d` and so on."""
    found = {}
    for group in structure.groups:
        if group.name not in whole:
            kinds = sorted({kind(rows, module, structure) for rows in group.rows if rows.role == "weight"})
            found.setdefault(", ".join(kinds), []).append(group.size)
    return "; ".join(f"{' + '.join(map(str, sizes))} ({text})" for text, sizes in found.items())


def kind(rows, module, structure):
    layer = dict(module.named_modules()).get(layer_of(rows.tensor))
    name = type(layer).__name__.removeprefix("Parametrized") if layer is not None else "Parameter"
    count = rows.index.shape[1]
    row = "column" if rows.axis == 1 else "row"
    return f"{row} of {name}" if count == 1 else f"{count} {row}s of {name}"


def whole(structure, ledger):
    """Layers and parameters that the first task owns whole."""
    layers = [layer for group in structure.groups if group.name in ledger.whole for layer in group.layers]
    alone = [
        name for name, uses in structure.entries.items() if all(bool((use.target == NO_UNIT).all()) for use in uses)
    ]
    return ", ".join(f"`{name.removeprefix('network.network.')}`" for name in [*layers, *alone]) or "nothing"


def line(*cells):
    return f"| {' | '.join(cells)} |"


def rows_of_table():
    """The rows as they stand in the documentation, by the name of the network, without the accuracies."""
    text = PATH.read_text() if PATH.exists() else ""
    rows = [row.strip("| ").split(" | ") for row in re.findall(r"^\| .* \|$", text, flags=re.MULTILINE)]
    return {row[0]: row[1:-1] for row in rows}
