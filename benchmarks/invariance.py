"""What the invariance phase does: accuracy around the partition, and forgetting under perturb with and without it."""

from statistics import mean

from common import arguments, markdown, percent, run_all, write_section

DATA = {
    "Split-Digits": ("split_digits", [], (12, 8)),
    "Split-MNIST": ("split_mnist", ["experiment=split_mnist"], (6, 4)),
}


def main() -> None:
    options = arguments()
    jobs = {}
    for data, overrides, epochs in DATA.values():
        where = [f"data_dir={options.data_dir}"] if data == "split_mnist" else []
        for variant, more in variants(*epochs).items():
            for seed in options.seeds:
                jobs[name(data, variant, seed)] = [*overrides, *where, "task_inference=none", f"seed={seed}", *more]
    found = run_all(options, jobs)
    stages, forgetting = [], []
    for title, (data, _, epochs) in DATA.items():
        for variant in variants(*epochs):
            results = [found[name(data, variant, seed)] for seed in options.seeds]
            row = [title, variant]
            for stage in ("learned", "partitioned", "retrained"):
                row.append(percent([mean(task[stage] for task in r["stages"].values()) for r in results]))
            for key in ("ablation_accuracy", "retrained_ablation_accuracy"):
                known = all(key in p for r in results for p in r["partition"])
                row.append(percent([mean(p[key] for p in r["partition"]) for r in results]) if known else "")
            stages.append(row)
            forgetting.append(
                [
                    title,
                    variant,
                    percent([r["average_accuracy"] for r in results]),
                    percent([r["forgetting"] for r in results]),
                    ", ".join(f"{100 * r['forgetting']:.2f}" for r in results),
                ]
            )
    head = ["data", "variant", "before the partition", "right after", "after INVARIANCE"]
    head += ["without redundant units, right after", "without them, after INVARIANCE"]
    write_section("stages", markdown(head, stages))
    head = ["data", "variant", "average accuracy %", "forgetting (points)", "each seed"]
    write_section("forgetting", markdown(head, forgetting))


def variants(epochs: int, invariance_epochs: int) -> dict[str, list[str]]:
    """The overrides of each; without INVARIANCE all epochs are LEARN."""
    perturb = {
        f"perturb, {name}": ["isolation=perturb", f"invariance={name}"]
        for name in ("ablate", "resample", "mixture", "rotation", "noise")
    }
    none = ["isolation=perturb", f"epochs={epochs + invariance_epochs}", "invariance_epochs=0"]
    return {"exact": ["isolation=exact"], "perturb, no INVARIANCE": none, **perturb}


def name(data: str, variant: str, seed: int) -> str:
    return f"{data}-{variant.replace(', ', '-').replace(' ', '-').lower()}-{seed}"


if __name__ == "__main__":
    main()
