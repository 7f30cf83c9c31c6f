"""Nobody says which task it is, in other domains: Permuted-MNIST, ten tasks, beside fine-tuning and joint training."""

from statistics import mean

from common import arguments, markdown, percent, run_methods, write_section

METHODS = {"exact": [], "finetune": ["method=finetune"], "joint": ["method=joint"]}


def main() -> None:
    options = arguments(seeds=[0])
    common = ["experiment=permuted_mnist", f"data_dir={options.data_dir}"]
    rows = []
    for method, results in run_methods(options, "permuted", METHODS, common).items():
        told = [r["class_incremental"] for r in results]
        kept = mean(t["stored_floats"] for t in told) if method == "exact" else 0
        rows.append(
            [
                method,
                percent([r["average_accuracy"] for r in results]),
                percent([t["average_accuracy"] for t in told]),
                percent([t["task_inference_accuracy"] for t in told]),
                percent([r["forgetting"] for r in results]),
                f"{kept:.0f} ({100 * kept / told[0]['network_parameters']:.1f} %)" if kept else "0",
                f"{mean(r['seconds'] for r in results) / 60:.0f}",
            ]
        )
    head = ["method", "task-incremental %", "no task given %", "task told %", "forgetting", "floats kept", "minutes"]
    write_section("permuted", markdown(head, rows))


if __name__ == "__main__":
    main()
