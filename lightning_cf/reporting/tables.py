"""The methods of a run side by side, as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning_cf.sequence.result import Result
from lightning_cf.sequence.unknown import CHANCE


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
    """Average accuracy where nobody names the task, for the table; empty where no task can be inferred."""
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
    told = chosen.class_incremental
    if told is not None and told["none_auroc_mean"] is not None:
        area = told["none_auroc_mean"]
        close = ", close to chance" if area < CHANCE else ""
        print(
            f"Unknown inputs are told from known ones with an AUROC of {area:.3f}{close} (each task unknown in turn)."
        )
    if chosen.capacity:
        shares = ", ".join(f"{layer} {shares[-1]:.2f}" for layer, shares in chosen.capacity.items())
        print(f"Free units left: {shares}.")
    pictures = ["accuracy_matrix.png", "forgetting.png", *(["capacity.png"] if chosen.capacity else [])]
    print(f"{root}: result.json, {', '.join(pictures)}; a folder for each task in */tasks")


LABELS = {"exact": "exact isolation", "perturb": "perturbation only", "finetune": "plain fine-tuning", "joint": "joint"}
