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
SUMS = ",".join(
    f"{{_target_:lightning_cf.task_inference.accumulated.Accumulated,name:lda_{name},budget:{budget}}}"
    for name, budget in {"8_million": 8_000_000, "2.5_million": 2_500_000}.items()
)
NETWORKS = {
    "MLP": [f"task_inference.strategy=[{SUMS},reconstruction_logits]"],
    "CNN": [f"task_inference.strategy=[{SUMS}]", "model=cnn", "epochs=2", "invariance_epochs=4"],
}
"""Of Split-MNIST: classifiers that may keep so many numbers, beside a head; the CNN learns in fewer epochs."""

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
        if name == "mnist":
            found = run_methods(options, "class_incremental", NETWORKS, common)
            write_section("sums", sums_table(found))
        found = run_methods(options, f"class_incremental{title}", METHODS, common)
        write_section(f"class-incremental{title}", methods_table(found))
        write_section(f"strategies{title}", strategies_table(found["exact"]))
        found = run_methods(fewer, f"class_incremental{title}", alone, common)
        write_section(f"strategies-alone{title}", alone_table(found))


def sums_table(found: dict[str, list[dict]]) -> str:
    """What each classifier reaches on each network, alone and together with the network's outputs."""
    rows = []
    for network, results in found.items():
        for name in results[0]["task_inference"]:
            told = [r["task_inference"][name] for r in results]
            rows.append(
                [
                    network,
                    f"`{name}`",
                    percent([r["average_accuracy"] for r in results]),
                    percent([t["task_incremental_accuracy"] for t in told]),
                    percent([t["average_accuracy"] for t in told]),
                    ", ".join(f"{100 * t['average_accuracy']:.2f}" for t in told),
                    percent([r["forgetting"] for r in results]),
                    f"{mean(t['none_auroc_mean'] for t in told):.3f}",
                    f"{mean(t['stored_floats'] for t in told):.0f}",
                    f"{mean(r['seconds'] for r in results):.0f}",
                ]
            )
    head = ["network", "told by", "task-incremental %", "with it", "class-incremental %", "each seed", "forgetting"]
    return markdown([*head, "AUROC of none", "numbers kept", "seconds"], rows)


def methods_table(found: dict[str, list[dict]]) -> str:
    rows = []
    for method, results in found.items():
        told = [r["class_incremental"] for r in results]
        partitioned = method.startswith(("exact", "perturb"))
        kept = mean(t["stored_floats"] for t in told) if partitioned else 0
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
                f"{kept:.0f} ({100 * kept / told[0]['network_parameters']:.1f} %)" if kept else "0",
                f"{mean(r['seconds'] for r in results):.0f}",
            ]
        )
    head = ["method", "told by", "task-incremental %", "class-incremental %", "each seed", "forgetting"]
    return markdown([*head, "AUROC of none", "floats kept", "seconds"], rows)


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
