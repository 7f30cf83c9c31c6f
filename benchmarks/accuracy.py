"""Split-MNIST, MLP 784-400-400, ten epochs a task: exact isolation beside fine-tuning and joint training."""

from statistics import mean

from common import arguments, markdown, percent, run_methods, write_section

METHODS = {
    "exact": ["isolation=exact"],
    "exact, measure=update": ["isolation=exact", "partition.measure=update"],
    "exact, measure=activation": ["isolation=exact", "partition.measure=activation"],
    "exact, reinitialise=false": ["isolation=exact", "partition.reinitialise=false"],
    "finetune": ["method=finetune"],
    "joint": ["method=joint"],
}


def main() -> None:
    options = arguments()
    common = ["experiment=split_mnist", "task_inference=none", f"data_dir={options.data_dir}"]
    rows = []
    for method, results in run_methods(options, "split_mnist", METHODS, common).items():
        free = [
            sum(shares[-1] for shares in r["capacity"].values()) / len(r["capacity"]) for r in results if r["capacity"]
        ]
        rows.append(
            [
                method,
                percent([r["average_accuracy"] for r in results]),
                ", ".join(f"{100 * r['average_accuracy']:.2f}" for r in results),
                percent([r["forgetting"] for r in results]),
                percent([r["backward_transfer"] for r in results]),
                percent(free) if free else "",
                f"{mean(r['seconds'] for r in results):.0f}",
            ]
        )
    head = ["method", "task-IL %", "each seed", "forgetting", "backward transfer", "free units left %", "seconds"]
    write_section("accuracy", markdown(head, rows))


if __name__ == "__main__":
    main()
