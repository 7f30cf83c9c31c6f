"""Nobody says which task it is: Split-MNIST and Split-Digits, every strategy beside fine-tuning and joint training."""

from argparse import Namespace
from itertools import product
from statistics import mean

from common import markdown, options_parser, percent, run_all, run_methods, write_section

MNIST = ["experiment=class_incremental"]
METHODS = {
    "exact": ["task_inference=unchanged"],
    "finetune": ["method=finetune"],
    "joint": ["method=joint"],
    "joint, over all outputs": ["method=joint", "masking.mask_outputs=false"],
    "perturb": ["isolation=perturb"],
}
KEPT = {
    "exact, 8 million": ["task_inference.budget=7900000"],
    "exact, 2.5 million": ["task_inference.budget=2400000"],
    "exact, CNN, 8 million": [
        *("task_inference.strategy=lda", "task_inference.budget=8000000"),
        *("model=cnn", "epochs=2", "invariance_epochs=4"),
    ],
}
"""Of Split-MNIST: how many numbers may be kept, by ``lda`` and a head together; and another network, which learns in
fewer epochs."""

ALONE = ("neither", "neither_mahalanobis", "rotations", "rotations_once")
"""Strategies that train over changed inputs, and so change what others see: each in a run of its own, two seeds."""

WEIGHTS, RATES = (3, 10), (0.004, 0.008)
"""What the options of the experiment were chosen from, on validation data with the first seed."""

CHOICE = ["tasks.source.limit=20000"]
"""A choice is made after learning from fewer images."""

DATA = {"mnist": "", "digits": "-digits"}
"""Data sets, with the endings of their tables' names."""

BESIDE = ("lda", "ridge", "input_gaussian", "input_subspaces", "input_autoencoder")
"""Models of the input that stand beside the network."""


def main() -> None:
    parser = options_parser()
    parser.add_argument("--processes", type=int, default=2, help="runs at the same time")
    parser.add_argument("--only", choices=DATA, help="one of the data sets instead of both")
    options = parser.parse_args()
    if options.choose:
        choose(options)
    else:
        report(options)


def choose(options: Namespace) -> None:
    pairs = list(product(WEIGHTS, RATES))
    common = [*MNIST, *CHOICE, f"data_dir={options.data_dir}", f"seed={options.seeds[0]}", "score_on=validation"]
    jobs = {
        f"class_incremental-choose-{weight}-{lr}": [
            *common,
            f"task_inference.weight={weight}",
            f"model.optimizer.lr={lr}",
        ]
        for weight, lr in pairs
    }
    rows = []
    for (weight, lr), result in zip(pairs, run_all(options, jobs).values(), strict=True):
        scores = (result["average_accuracy"], result["class_incremental"]["average_accuracy"])
        rows.append([str(weight), str(lr), *(f"{100 * score:.2f}" for score in scores)])
    head = ["weight of the head", "learning rate", "task-incremental %", "class-incremental %"]
    write_section("class-incremental-chosen", markdown(head, rows))


def report(options: Namespace) -> None:
    alone = {name: [f"task_inference.strategy={name}"] for name in ALONE}
    fewer = Namespace(**{**vars(options), "seeds": options.seeds[:2]})
    for name, title in DATA.items():
        if options.only not in (None, name):
            continue
        common = [] if name == "digits" else [*MNIST, f"data_dir={options.data_dir}"]
        methods = METHODS if name == "digits" else METHODS | KEPT
        found = run_methods(options, f"class_incremental{title}", methods, common)
        write_section(f"class-incremental{title}", methods_table(found))
        write_section(f"strategies{title}", strategies_table(found["exact"]))
        found = run_methods(fewer, f"class_incremental{title}", alone, common)
        write_section(f"strategies-alone{title}", alone_table(found))


def methods_table(found: dict[str, list[dict]]) -> str:
    rows = []
    for method, results in found.items():
        told = [r["class_incremental"] for r in results]
        partitioned = method.startswith(("exact", "perturb"))
        kept = [_kept(r, whole=method in KEPT) if partitioned else 0 for r in results]
        names = {next(iter(r["task_inference"])) for r in results} if partitioned else {"highest output"}
        rows.append(
            [
                method,
                " or ".join(sorted(names)),
                percent([r["average_accuracy"] for r in results]),
                percent([t["average_accuracy"] for t in told]),
                ", ".join(f"{100 * t['average_accuracy']:.2f}" for t in told),
                percent([r["forgetting"] for r in results]),
                f"{mean(t['none_auroc_mean'] for t in told):.3f}" if partitioned else "",
                f"{mean(kept):.0f} ({100 * mean(kept) / told[0]['network_parameters']:.1f} %)" if any(kept) else "0",
                f"{mean(r['seconds'] for r in results):.0f}",
            ]
        )
    head = ["method", "told by", "task-incremental %", "class-incremental %", "each seed", "forgetting"]
    return markdown([*head, "AUROC of none", "floats kept", "seconds"], rows)


def _kept(result: dict, *, whole: bool) -> int:
    """How many numbers what names the task keeps; with the whole, what was fitted to choose from, too."""
    if not whole:
        return result["class_incremental"]["stored_floats"]
    return sum(told["stored_floats"] for told in result["task_inference"].values())


def strategies_table(results: list[dict]) -> str:
    rows = []
    names = list(results[0]["task_inference"])
    for name in [*(n for n in names if n not in BESIDE), *(n for n in names if n in BESIDE)]:
        told = [r["task_inference"][name] for r in results]
        auroc = [t["none_auroc_mean"] for t in told]
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
    return markdown(head, rows)


def alone_table(found: dict[str, list[dict]]) -> str:
    rows = []
    for name, results in found.items():
        told = [r["task_inference"][name] for r in results]
        rows.append(
            [
                f"`{name}`",
                percent([r["average_accuracy"] for r in results]),
                percent([t["average_accuracy"] for t in told]),
                f"{mean(t['none_auroc_mean'] for t in told):.3f}",
                f"{mean(t['stored_floats'] for t in told):.0f}",
                f"{mean(r['seconds'] for r in results):.0f}",
            ]
        )
    head = ["strategy", "task-incremental %", "class-incremental %", "AUROC of none", "floats kept", "seconds"]
    return markdown(head, rows)


if __name__ == "__main__":
    main()
