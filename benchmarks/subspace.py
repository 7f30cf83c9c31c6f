"""What a sub-space trades: its size against retention and plasticity, under perturb, on Split-MNIST at reduced size."""

import statistics

from common import HERE, arguments, markdown, percent, write_section
from matplotlib.figure import Figure
from small import Job, run_all

SIZES = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0]
KINDS = {"random": "#1b6ca8", "learned": "#d98324"}
SCORES = {"forgetting": "forgetting (points)", "learned": "later tasks, as they were learned (%)"}


def main() -> None:
    options = arguments()
    plain = {"isolation": "perturb", "perturbation": "resample", "invariance epochs": 4}
    jobs = [
        {**plain, "subspace": kind, "dimensions": size, "seed": seed}
        for kind in KINDS
        for size in SIZES
        for seed in options.seeds
    ]
    held = run_all(options, "subspace", jobs)
    free = run_all(options, "subspace", [{**plain, "seed": seed} for seed in options.seeds])
    rows = [
        row(kind, f"{100 * size:g}", [job for job in held if (job["subspace"], job["dimensions"]) == (kind, size)])
        for kind in KINDS
        for size in SIZES
    ]
    head = [
        "sub-space",
        "size (% of the vector's length)",
        "forgetting (points)",
        "later tasks as learned %",
        "task-IL %",
    ]
    write_section("subspace", markdown(head, [*rows, row("none", "", free)]))
    picture(held, free).savefig(HERE / "subspace.png", dpi=150)


def row(kind: str, size: str, runs: list[Job]) -> list[str]:
    return [
        kind,
        size,
        *(percent([run[score] for run in runs]) for score in ("forgetting", "learned", "average_accuracy")),
    ]


def picture(held: list[Job], free: list[Job]) -> Figure:
    """Retention and plasticity over the size, a line a kind; a dashed line without a sub-space."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axis, (score, label) in zip(figure.subplots(1, 2), SCORES.items(), strict=True):
        for kind, color in KINDS.items():
            runs = [
                [100 * job[score] for job in held if (job["subspace"], job["dimensions"]) == (kind, s)] for s in SIZES
            ]
            axis.plot([100 * s for s in SIZES], list(map(statistics.mean, runs)), marker="o", color=color, label=kind)
            lows, highs = list(map(min, runs)), list(map(max, runs))
            axis.fill_between([100 * s for s in SIZES], lows, highs, color=color, alpha=0.15, linewidth=0)
        without = statistics.mean(100 * job[score] for job in free)
        axis.axhline(without, color="#8c8c8c", linestyle="--", label="none")
        axis.set_xscale("log")
        axis.set_xticks([100 * s for s in SIZES], [f"{100 * s:g}" for s in SIZES])
        axis.minorticks_off()
        axis.set_xlabel("size of the sub-space (% of the weight vector's length)")
        axis.set_ylabel(label)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    main()
