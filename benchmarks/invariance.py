"""What the invariance phase does: accuracy around the partition, and forgetting under perturb with and without it."""

from statistics import mean

from common import arguments, markdown, percent, run, write_section

DATA = {
    "Split-Digits": ("split_digits", [], (12, 8)),
    "Split-MNIST": ("split_mnist", ["experiment=split_mnist"], (6, 4)),
}


def main() -> None:
    options = arguments()
    stages, forgetting = [], []
    for title, (name, overrides, (epochs, invariance_epochs)) in DATA.items():
        variants = {
            "exact": ["isolation=exact"],
            "perturb, no INVARIANCE": [
                "isolation=perturb",
                f"epochs={epochs + invariance_epochs}",
                "invariance_epochs=0",
            ],
            "perturb, Noise": ["isolation=perturb", "invariance=noise"],
            "perturb, Ablate": ["isolation=perturb", "invariance=ablate"],
            "perturb, Resample": ["isolation=perturb", "invariance=resample"],
        }
        for variant, more in variants.items():
            slug = variant.replace("perturb, ", "perturb-").replace(" ", "-").lower()
            data = [f"data_dir={options.data_dir}"] if name == "split_mnist" else []
            results = [
                run(options.runs / f"{name}-{slug}-{seed}", *overrides, *data, f"seed={seed}", *more)
                for seed in options.seeds
            ]
            folded = [mean(p["ablation_accuracy"] for p in r["partition"]) for r in results]
            scores = {
                stage: [mean(task[stage] for task in r["stages"].values()) for r in results]
                for stage in ("learned", "partitioned", "retrained")
            }
            stages.append([title, variant, *(percent(scores[stage]) for stage in scores), percent(folded)])
            forgetting.append(
                [
                    title,
                    variant,
                    percent([r["average_accuracy"] for r in results]),
                    percent([r["forgetting"] for r in results]),
                    ", ".join(f"{100 * r['forgetting']:.2f}" for r in results),
                ]
            )
    head = [
        "data",
        "variant",
        "before the partition",
        "right after",
        "after INVARIANCE",
        "without redundant units, folded",
    ]
    write_section("stages", markdown(head, stages))
    head = ["data", "variant", "average accuracy %", "forgetting (points)", "each seed"]
    write_section("forgetting", markdown(head, forgetting))


if __name__ == "__main__":
    main()
