"""Pictures of a run's results: the accuracy matrix, forgetting, and the units left free."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from lightning_cf.reporting.tables import LABELS
from lightning_cf.sequence.result import Result

COLORS = {"exact": "#1b6ca8", "perturb": "#d98324", "finetune": "#8c8c8c", "joint": "#4b8f5a"}


def write_pictures(results: Mapping[str, Result], folder: Path) -> None:
    """Writes ``accuracy_matrix.png``, ``forgetting.png`` and, where there were partitions, ``capacity.png``."""
    chosen = next(iter(results.values()))
    accuracy_picture(results).savefig(folder / "accuracy_matrix.png", dpi=150)
    forgetting_picture(results).savefig(folder / "forgetting.png", dpi=150)
    if chosen.capacity:
        capacity_picture(chosen).savefig(folder / "capacity.png", dpi=150)


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
