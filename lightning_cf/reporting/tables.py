"""Tables and pictures of results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from lightning_cf.errors import ContinualError, RunWarning, warn
from lightning_cf.records.record import PartitionRecord
from lightning_cf.reporting.unit_pictures import similarity_picture, units_picture
from lightning_cf.sequence.result import Result

LABELS = {"exact": "exact isolation", "perturb": "perturbation only", "finetune": "plain fine-tuning", "joint": "joint"}
COLORS = {"exact": "#1b6ca8", "perturb": "#d98324", "finetune": "#8c8c8c", "joint": "#4b8f5a"}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A text table, the first two columns to the left.

    >>> print(table(["task", "of", "n"], [["a", "b", "10"]]))
    task  of   n
    a     b   10
    """
    widths = [max(len(str(row[column])) for row in [head, *rows]) for column in range(len(head))]
    lines = []
    for row in [head, *rows]:
        cells = [
            str(x).ljust(w) if i < 2 else str(x).rjust(w) for i, (x, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def summary(results: Mapping[str, Result]) -> str:
    """The methods side by side; the first is the run's own."""
    rows = [
        [
            name,
            LABELS[name],
            f"{result.accuracy.average:.4f}",
            _told(result),
            f"{result.accuracy.forgetting:.4f}",
            f"{result.accuracy.backward_transfer:+.4f}",
            f"{result.accuracy.forward_transfer:+.4f}",
            f"{result.seconds:.1f}",
        ]
        for name, result in results.items()
    ]
    scenario = next(iter(results.values())).scenario
    head = ["method", "", "task-incremental", scenario, "forgetting", "backward", "forward", "seconds"]
    return table(head, rows)


def _told(result: Result) -> str:
    """Accuracy where nobody names the task."""
    found = result.class_incremental
    return "" if found is None else f"{found['average_accuracy']:.4f}"


def print_summary(results: Mapping[str, Result], root: Path) -> None:
    """Prints the comparison, the capacity left and where the files are."""
    chosen = next(iter(results.values()))
    print(f"\n{len(chosen.tasks)} tasks: {', '.join(chosen.tasks)}\n")
    print(summary(results))
    constant = [score for score in chosen.constant_predictor if score is not None]
    if constant:
        print(f"\nA constant predictor scores {sum(constant) / len(constant):.4f}.")
    if chosen.capacity:
        shares = ", ".join(f"{layer} {shares[-1]:.2f}" for layer, shares in chosen.capacity.items())
        print(f"Free units left: {shares}.")
    pictures = ["accuracy_matrix.png", "forgetting.png", *(["capacity.png"] if chosen.capacity else [])]
    print(f"{root}: result.json, {', '.join(pictures)}; a folder for each task in */tasks")


def write_pictures(results: Mapping[str, Result], folder: Path) -> None:
    """Writes ``accuracy_matrix.png``, ``forgetting.png`` and, where there were partitions, ``capacity.png``."""
    chosen = next(iter(results.values()))
    accuracy_picture(results).savefig(folder / "accuracy_matrix.png", dpi=150)
    forgetting_picture(results).savefig(folder / "forgetting.png", dpi=150)
    if chosen.capacity:
        capacity_picture(chosen).savefig(folder / "capacity.png", dpi=150)


def write_unit_pictures(tasks: Path) -> None:
    """Writes ``units.png`` and ``similarity.png`` beside the record of every task's partition."""
    for manifest in sorted(tasks.glob("*/partition.json")):
        try:
            record = PartitionRecord.load(manifest.parent)
        except ContinualError as error:
            warn(f"{error} Its pictures are left out.", RunWarning)
            continue
        if not record.layers:
            continue  # a network that is its output layer alone has no units to show
        units_picture(record).savefig(manifest.parent / "units.png", dpi=150)
        similarity_picture(record).savefig(manifest.parent / "similarity.png", dpi=150)


def accuracy_picture(results: Mapping[str, Result]) -> Figure:
    """Accuracy of each task (column) after each task (row), a panel a method."""
    sequential = {name: result for name, result in results.items() if result.accuracy.sequential} or dict(results)
    tasks = next(iter(sequential.values())).tasks
    figure = Figure(figsize=(1.2 + 3.6 * len(sequential), 4.2), layout="constrained")
    axes = figure.subplots(1, len(sequential), squeeze=False)[0]
    lowest = min(float(result.accuracy.matrix.min()) for result in sequential.values())
    for axis, (name, result) in zip(axes, sequential.items(), strict=True):
        matrix = result.accuracy.matrix
        image = axis.imshow(matrix.numpy(), vmin=min(lowest, 0.5), vmax=1, cmap="viridis")
        for row in range(len(matrix)):
            for column in range(len(tasks)):
                learned = column <= row or not result.accuracy.sequential
                axis.text(
                    column,
                    row,
                    f"{100 * float(matrix[row, column]):.1f}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="black" if float(matrix[row, column]) > 0.8 else "white",
                    alpha=1.0 if learned else 0.5,
                )
        axis.set_title(f"{LABELS[name]}: {100 * result.accuracy.average:.2f} %", fontsize=10)
        axis.set_xticks(range(len(tasks)), tasks, rotation=45, ha="right", fontsize=8, parse_math=False)
        axis.set_yticks(range(len(matrix)), tasks[: len(matrix)], fontsize=8, parse_math=False)
        axis.set_xlabel("scored on task")
    axes[0].set_ylabel("after learning task")
    figure.colorbar(image, ax=list(axes), label="accuracy", shrink=0.8)
    return figure


def forgetting_picture(results: Mapping[str, Result]) -> Figure:
    """Forgetting of each task, a group of bars a task."""
    tasks = next(iter(results.values())).tasks
    figure = Figure(figsize=(2 + 1.1 * len(tasks), 3.6), layout="constrained")
    axis = figure.subplots()
    width = 0.8 / len(results)
    for position, (name, result) in enumerate(results.items()):
        places = [task + (position - (len(results) - 1) / 2) * width for task in range(len(tasks))]
        bars = axis.bar(
            places,
            [100 * x for x in result.accuracy.forgetting_per_task],
            width,
            color=COLORS[name],
            label=LABELS[name],
        )
        axis.bar_label(bars, fmt="%.1f", fontsize=7)
    axis.set_xticks(range(len(tasks)), tasks, parse_math=False)
    axis.set_xlabel("task")
    axis.set_ylabel("forgetting (points of accuracy)")
    axis.set_ylim(bottom=0)
    axis.margins(y=0.15)
    axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def capacity_picture(result: Result) -> Figure:
    """Share of free units in each layer after each task."""
    figure = Figure(figsize=(2 + 1.1 * len(result.tasks), 3.6), layout="constrained")
    axis = figure.subplots()
    for position, (layer, shares) in enumerate(result.capacity.items()):
        axis.plot(
            range(len(shares) + 1),
            [100.0, *(100 * s for s in shares)],
            marker="os^Dv<>P"[position % 8],
            label=layer,
            alpha=0.8,
        )
    axis.set_xticks(range(len(result.tasks) + 1), ["start", *result.tasks], parse_math=False)
    axis.set_ylim(0, 105)
    axis.set_xlabel("after task")
    axis.set_ylabel("free units (%)")
    axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    return figure
