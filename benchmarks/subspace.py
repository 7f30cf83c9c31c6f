"""What a sub-space trades: its size against retention and plasticity, under perturb, on Split-MNIST at reduced size."""

import statistics

from common import HERE, arguments, markdown, percent, write_section
from matplotlib.figure import Figure
from small import IMAGES, Job, run_all

SIZES = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0]
HELD = {"isolation": "perturb", "perturbation": "resample", "invariance epochs": 4}
ALONE = {"isolation": "perturb", "perturbation": "", "invariance epochs": 0}
KINDS = {
    "random": ({**HELD, "subspace": "random"}, "#1b6ca8"),
    "learned": ({**HELD, "subspace": "learned"}, "#d98324"),
    "random, no INVARIANCE": ({**ALONE, "subspace": "random"}, "#4b8f5a"),
}
SCORES = {"forgetting": "forgetting (points)", "learned": "later tasks, as they were learned (%)"}


def main() -> None:
    options = arguments(images=IMAGES)
    runs = {}
    for kind, (job, _) in KINDS.items():
        for size in SIZES:
            jobs = [{**job, "dimensions": size, "seed": seed} for seed in options.seeds]
            runs[kind, size] = jobs
    done = iter(run_all(options, "subspace", [job for jobs in runs.values() for job in jobs]))
    runs = {key: [next(done) for _ in jobs] for key, jobs in runs.items()}
    free = {
        kind: run_all(options, "subspace", [{**job, "seed": seed} for seed in options.seeds])
        for kind, job in (("none", HELD), ("none, no INVARIANCE", ALONE))
    }
    rows = [row(kind, f"{100 * size:g}", found) for (kind, size), found in runs.items()]
    rows += [row(kind, "", found) for kind, found in free.items()]
    head = [
        "sub-space",
        "size (% of the vector's length)",
        "forgetting (points)",
        "later tasks as learned %",
        "task-IL %",
    ]
    write_section("subspace", markdown(head, rows))
    picture(runs, free).savefig(HERE / "subspace.png", dpi=150)


def row(kind: str, size: str, runs: list[Job]) -> list[str]:
    return [kind, size, *(percent([run[key] for run in runs]) for key in ("forgetting", "learned", "average_accuracy"))]


def picture(runs: dict[tuple[str, float], list[Job]], free: dict[str, list[Job]]) -> Figure:
    """Retention and plasticity over the size, a line a kind; dashed lines without a sub-space."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    places = [100 * size for size in SIZES]
    for axis, (score, label) in zip(figure.subplots(1, 2), SCORES.items(), strict=True):
        for kind, (_, color) in KINDS.items():
            values = [[100 * job[score] for job in runs[kind, size]] for size in SIZES]
            axis.plot(places, list(map(statistics.mean, values)), marker="o", color=color, label=kind)
            axis.fill_between(
                places, list(map(min, values)), list(map(max, values)), color=color, alpha=0.12, linewidth=0
            )
        for (kind, found), color in zip(free.items(), ("#8c8c8c", "#4b8f5a"), strict=True):
            axis.axhline(statistics.mean(100 * job[score] for job in found), color=color, linestyle="--", label=kind)
        axis.set_xscale("log")
        axis.set_xticks(places, [f"{place:g}" for place in places])
        axis.minorticks_off()
        axis.set_xlabel("size of the sub-space (% of the weight vector's length)")
        axis.set_ylabel(label)
        axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    main()
