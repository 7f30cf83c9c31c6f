"""The table in ``docs/architectures.md``: what the tests of the architectures found, a row for each of them."""

import re
from pathlib import Path

from lightning_cf.learner.keeping import state_of
from lightning_cf.network.structure import NO_UNIT, layer_of

PATH = Path(__file__).parent.parent / "docs" / "architectures.md"
START, END = "<!-- table -->\n", "<!-- end of table -->"
HEADER = [
    "network",
    "units that tasks share out",
    "under `exact`",
    "left whole to the first task",
    "accuracy of each task when learned",
]


def working(name, module, scores):
    state = state_of(module)
    exact = "bitwise, norms by owners" if state.ledger.norms else "bitwise"
    return [name, units(state, module), exact, whole(state), accuracies(scores)]


def refused(name, module, reason, scores):
    text = f"refused: {reason}"
    return [name, f"{units(state_of(module), module)}, under `perturb`", text, "-", f"{accuracies(scores)} (`perturb`)"]


def units(state, module):
    """How many there are in each layer, and what they are."""
    found = {}
    for group in state.structure.groups:
        if group.name not in state.ledger.whole:
            kinds = sorted({kind(rows, module) for rows in group.rows if rows.role == "weight"})
            found.setdefault(" and ".join(kinds), []).append(group.size)
    return "; ".join(f"{', '.join(map(str, sizes))}: {text}" for text, sizes in found.items())


def kind(rows, module):
    """What one unit is in a layer."""
    layer = dict(module.named_modules()).get(layer_of(rows.tensor))
    name = "parameter" if layer is None or layer_of(rows.tensor) == "" else type(layer).__name__
    name = "parameter" if rows.tensor.rpartition(".")[0].endswith(".net") else name.removeprefix("Parametrized")
    count = rows.index.shape[1]
    row = "channel" if name.startswith("Conv") else ("column" if rows.axis == 1 else "row")
    return f"{row} of {name}" if count == 1 else f"{count} {row}s of {name}"


def whole(state):
    """Layers and parameters whose units share one fate, or that have none."""
    layers = [layer for group in state.structure.groups if group.name in state.ledger.whole for layer in group.layers]
    entries = {name: uses for name, uses in state.structure.entries.items() if uses[0].role != "constant"}
    alone = [name for name, uses in entries.items() if all(bool((use.target == NO_UNIT).all()) for use in uses)]
    names = [name.removeprefix("network.net.") for name in [*layers, *alone]]
    return ", ".join(f"`{name}`" for name in dict.fromkeys(names)) or "nothing"


def accuracies(scores):
    return " / ".join(f"{score:.2f}" for score in scores)


def line(cells):
    return f"| {' | '.join(cells)} |\n"


def documented(name):
    """A network's row as it stands in the documentation, without the accuracies, which differ between machines."""
    rows = [row.strip("| ").split(" | ") for row in re.findall(r"^\| .* \|$", PATH.read_text(), flags=re.MULTILINE)]
    return next((row[:-1] for row in rows if row[0] == name), None)


def write(rows):
    """Writes the rows that ran, in their order in the tests."""
    before, _, rest = PATH.read_text().partition(START)
    _, _, after = rest.partition(END)
    table = line(HEADER) + line(["---"] * len(HEADER)) + "".join(map(line, rows))
    PATH.write_text(before + START + table + END + after)
