"""Nobody says which task it is, in other domains: Permuted-MNIST, ten tasks, beside fine-tuning and joint training."""

from argparse import Namespace
from statistics import mean

from common import arguments, markdown, percent, run_methods, write_section

METHODS = {"exact": [], "finetune": ["method=finetune"], "joint": ["method=joint"]}


def main() -> None:
    options = arguments(seeds=[])
    common = ["experiment=permuted_mnist", f"data_dir={options.data_dir}"]
    rows = []
    for method, overrides in METHODS.items():
        seeds = options.seeds or ([0, 1, 2] if method == "exact" else [0])
        chosen = Namespace(**{**vars(options), "seeds": seeds})
        results = run_methods(chosen, "permuted", {method: overrides}, common)[method]
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
                ", ".join(map(str, seeds)),
                f"{mean(r['seconds'] for r in results):.0f}",
            ]
        )
    head = ["method", "task-incremental %", "no task given %", "task told %", "forgetting", "floats kept", "seeds"]
    write_section("permuted", markdown([*head, "seconds"], rows))


if __name__ == "__main__":
    main()
