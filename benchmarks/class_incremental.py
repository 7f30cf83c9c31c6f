"""Nobody says which task it is: Split-MNIST and Split-Digits, every strategy beside fine-tuning and joint training."""

from statistics import mean

from common import arguments, markdown, percent, run_all, write_section

MNIST = ["experiment=class_incremental"]
METHODS = {
    "exact": ["task_inference=all"],
    "finetune": ["method=finetune"],
    "joint": ["method=joint"],
    "joint, over all outputs": ["method=joint", "masking.mask_outputs=false"],
}
BESIDE = ("input_gaussian", "input_subspaces")
"""Models of the input that stand beside the network."""


def main() -> None:
    options = arguments()
    jobs = {}
    for method, overrides in METHODS.items():
        for seed in options.seeds:
            place = [f"data_dir={options.data_dir}", f"seed={seed}"]
            jobs[f"class_incremental-{method}-{seed}"] = [*MNIST, *place, *overrides]
            jobs[f"class_incremental-digits-{method}-{seed}"] = [f"seed={seed}", *overrides]
    found = run_all(options, jobs)
    for title, prefix in {"": "class_incremental", "-digits": "class_incremental-digits"}.items():
        write_methods(f"class-incremental{title}", prefix, found, options.seeds)
        write_strategies(f"strategies{title}", [found[f"{prefix}-exact-{seed}"] for seed in options.seeds])


def write_methods(section: str, prefix: str, found: dict[str, dict], seeds: list[int]) -> None:
    rows = []
    for method in METHODS:
        results = [found[f"{prefix}-{method}-{seed}"] for seed in seeds]
        told = [r["class_incremental"] for r in results]
        kept = [t["stored_floats"] if method == "exact" else 0 for t in told]
        rows.append(
            [
                method,
                percent([r["average_accuracy"] for r in results]),
                percent([t["average_accuracy"] for t in told]),
                ", ".join(f"{100 * t['average_accuracy']:.2f}" for t in told),
                percent([r["forgetting"] for r in results]),
                f"{mean(kept):.0f} ({100 * mean(kept) / told[0]['network_parameters']:.1f} %)" if any(kept) else "0",
                f"{mean(r['seconds'] for r in results):.0f}",
            ]
        )
    head = ["method", "task-incremental %", "class-incremental %", "each seed", "forgetting", "floats kept", "seconds"]
    write_section(section, markdown(head, rows))


def write_strategies(section: str, results: list[dict]) -> None:
    rows = []
    names = list(results[0]["task_inference"])
    for name in [*(n for n in names if n not in BESIDE), *(n for n in names if n in BESIDE)]:
        told = [r["task_inference"][name] for r in results]
        auroc = [t["none_auroc"][-2] for t in told]
        rows.append(
            [
                f"`{name}`" + (" (beside the network)" if name in BESIDE else ""),
                percent([t["average_accuracy"] for t in told]),
                percent([t["task_inference_accuracy"] for t in told]),
                f"{mean(auroc):.3f}",
                f"{mean(t['stored_floats'] for t in told):.0f}",
            ]
        )
    head = ["strategy", "class-incremental %", "task told %", "AUROC of none", "floats kept"]
    write_section(section, markdown(head, rows))


if __name__ == "__main__":
    main()
