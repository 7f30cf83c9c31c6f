"""Which options matter: factorial runs on Split-MNIST at reduced size; the effect of each value, table and picture.

The effect of an option's value is the mean difference to the reference value, over all pairs of runs that differ in
nothing else; and, for exact isolation, once more over those of them that fold and have an INVARIANCE phase.
"""

import itertools
import statistics

from common import HERE, arguments, markdown, write_section
from matplotlib.figure import Figure
from small import IMAGES, Job, run_all

REFERENCE = {
    "measure": "weight",
    "threshold": "auto",
    "fold": True,
    "reinitialise": True,
    "invariance epochs": 4,
    "perturbation": "none",
}
EXACT = {
    "measure": ["weight", "update", "activation"],
    "threshold": ["auto", 0.5],
    "invariance epochs": [0, 2, 4],
    "fold": [True, False],
    "reinitialise": [True, False],
}
PERTURB = {
    "perturbation": ["ablate", "resample", "noise", "rotation", "translation", "shear", "scaling", "mixture"],
    "threshold": ["auto", 0.5],
    "invariance epochs": [2, 4],
}
SCORES = ("average_accuracy", "forgetting", "learned", "partitioned", "free")


def main() -> None:
    options = arguments(images=IMAGES)
    exact = run_all(options, "ablation", grid("exact", EXACT, options.seeds))
    perturb = run_all(options, "ablation", grid("perturb", PERTURB, options.seeds))
    none = {**PERTURB, "perturbation": [""], "invariance epochs": [0]}
    # Without INVARIANCE all epochs are LEARN; such a run stands beside those of every number of epochs.
    for job in run_all(options, "ablation", grid("perturb", none, options.seeds)):
        perturb += [{**job, "perturbation": "none", "invariance epochs": n} for n in PERTURB["invariance epochs"]]
    disturbed = [job for job in perturb if job["perturbation"] != "none"]
    effects = {
        "exact": [row for factor in EXACT for row in effects_of(exact, factor, "average_accuracy")],
        "exact, with folding and INVARIANCE": [
            row for factor in EXACT for row in effects_of(working(exact, factor), factor, "average_accuracy")
        ],
        "perturb": [
            *effects_of(perturb, "perturbation", "forgetting"),
            *effects_of(disturbed, "threshold", "forgetting"),
            *effects_of(disturbed, "invariance epochs", "forgetting"),
        ],
        "perturb, with threshold auto": [
            *effects_of([job for job in perturb if job["threshold"] == "auto"], "perturbation", "forgetting"),
            *effects_of([job for job in disturbed if job["threshold"] == "auto"], "invariance epochs", "forgetting"),
        ],
    }
    everything, within, perturbed, auto = effects.values()
    write_section("ablation-exact", table("task-IL %", {"all runs": everything, "folding and INVARIANCE on": within}))
    write_section("ablation-perturb", table("forgetting (points)", {"all runs": perturbed}))
    write_section("ablation-perturb-auto", table("forgetting (points)", {"threshold auto": auto}))
    write_section("ablation-best", best({"exact": (EXACT, exact), "perturb": (PERTURB, disturbed)}))
    picture(effects).savefig(HERE / "ablation.png", dpi=150)


def grid(isolation: str, factors: dict[str, list], seeds: list[int]) -> list[Job]:
    return [
        {"isolation": isolation, **dict(zip(factors, levels, strict=True)), "seed": seed}
        for levels in itertools.product(*factors.values())
        for seed in seeds
    ]


def effects_of(jobs: list[Job], factor: str, score: str) -> list[tuple]:
    """For each value of a factor: its mean, and mean and standard error of the paired difference to the reference."""
    reference = REFERENCE[factor]
    values: dict[object, dict[tuple, float]] = {}
    for job in jobs:
        rest = tuple(str(value) for name, value in sorted(job.items()) if name not in SCORES and name != factor)
        values.setdefault(job[factor], {})[rest] = 100 * job[score]
    rows = []
    for level in sorted(values, key=lambda level: level != reference):
        differences = [value - values[reference][rest] for rest, value in values[level].items()]
        error = statistics.stdev(differences) / len(differences) ** 0.5
        rows.append((factor, level, statistics.mean(values[level].values()), statistics.mean(differences), error))
    return rows


def working(jobs: list[Job], factor: str) -> list[Job]:
    """Runs that fold and have an INVARIANCE phase, whichever of the two the factor itself varies."""
    wanted = {"fold": lambda fold: fold, "invariance epochs": lambda epochs: epochs > 0}
    return [job for job in jobs if all(ok(job[name]) for name, ok in wanted.items() if name != factor)]


def table(score: str, columns: dict[str, list[tuple]]) -> str:
    """Mean and difference of each value, over each choice of runs."""
    rows = []
    for effects in zip(*columns.values(), strict=True):
        factor, level = effects[0][:2]
        rows.append([factor, str(level)])
        for _, _, mean, difference, error in effects:
            rows[-1] += [f"{mean:.2f}", "" if REFERENCE[factor] == level else f"{difference:+.2f} ± {error:.2f}"]
    head = ["option", "value"]
    for name in columns:
        head += [f"{score}, {name}", "difference to the first value"]
    return markdown(head, rows)


def best(groups: dict[str, tuple[dict[str, list], list[Job]]]) -> str:
    """The five best settings under each isolation."""
    rows = []
    for isolation, (factors, jobs) in groups.items():
        settings: dict[str, list[Job]] = {}
        for job in jobs:
            settings.setdefault(", ".join(f"{factor} {job[factor]}" for factor in factors), []).append(job)
        ranked = sorted(settings.items(), key=lambda item: -statistics.mean(job["average_accuracy"] for job in item[1]))
        for rank, (setting, runs) in enumerate(ranked[:5], 1):
            means = [statistics.mean(run[score] for run in runs) for score in SCORES if score != "learned"]
            rows.append([isolation, f"{rank} of {len(ranked)}", setting, *(f"{100 * mean:.2f}" for mean in means)])
    head = ["isolation", "rank", "options", "task-IL %", "forgetting", "after the partition %", "free at the end %"]
    return markdown(head, rows)


def picture(effects: dict[str, list[tuple]]) -> Figure:
    """Differences to the reference with twice their standard error."""
    figure = Figure(figsize=(13, 9), layout="constrained")
    titles = {
        "exact": "exact: change of average accuracy\n(points, all runs; right is better)",
        "exact, with folding and INVARIANCE": "exact: change of average accuracy\n(points, folding and INVARIANCE on)",
        "perturb": "perturb: change of forgetting\n(points, all runs; left is better)",
        "perturb, with threshold auto": "perturb: change of forgetting\n(points, threshold auto)",
    }
    for axis, (name, rows) in zip(figure.subplots(2, 2).flatten(), effects.items(), strict=True):
        places = list(range(len(rows)))[::-1]
        for place, (factor, level, _, difference, error) in zip(places, rows, strict=True):
            reference = REFERENCE[factor] == level
            axis.errorbar(
                difference,
                place,
                xerr=None if reference else 2 * error,
                fmt="o",
                markersize=6,
                capsize=3,
                color="#8c8c8c" if reference else "#1b6ca8",
                markerfacecolor="white" if reference else "#1b6ca8",
            )
            if place and rows[len(rows) - place][0] != factor:
                axis.axhline(place - 0.5, color="#dddddd", linewidth=0.8)
        axis.axvline(0, color="#8c8c8c", linewidth=0.8, zorder=0)
        axis.set_yticks(places, [f"{factor}: {level}" for factor, level, *_ in rows], fontsize=8)
        axis.set_title(titles[name], fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    main()
