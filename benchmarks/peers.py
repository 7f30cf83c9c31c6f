"""Published methods of other libraries on Split-MNIST, each library in an environment of its own."""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from common import markdown, options_parser, percent, write_section

HERE = Path(__file__).parent / "peers"
CHOSEN = HERE / "chosen.json"
ADAM = (("Adam", 0.001), ("Adam", 0.004))
CHOICE = {"epochs": 3, "limit": 10_000}
"""A choice is made after fewer epochs, from fewer images."""
NETWORK = 784 * 400 + 400 + 400 * 400 + 400 + 400 * 10 + 10
"""Parameters of the network with ten outputs."""


@dataclass(frozen=True)
class Peer:
    """A method with what may be chosen for it.

    Attributes:
        library: which one has it.
        method: its name there.
        scenarios: trained once with the tasks' names ("task"), once without ("class"), or once for both.
        strengths: options to choose from.
        rates: optimizers and learning rates to choose from.
        fixed: options that are not chosen.
        chosen_as: the peer whose choice it takes.
    """

    library: str
    method: str
    scenarios: tuple[str, ...]
    strengths: tuple[dict[str, Any], ...]
    rates: tuple[tuple[str, float], ...] = ADAM
    fixed: dict[str, Any] = field(default_factory=dict)
    chosen_as: str | None = None


BOTH = ("task", "class")
DER = tuple({"alpha": a, "beta": b} for a, b in ((0.1, 0.5), (0.5, 0.5), (1.0, 1.0)))
SHRINKAGE = tuple({"shrinkage_param": s} for s in (1e-4, 1e-2))
PEERS = {
    "EWC": Peer("avalanche", "ewc", BOTH, tuple({"ewc_lambda": s} for s in (1e4, 1e6, 1e8))),
    "SI": Peer("avalanche", "si", BOTH, tuple({"si_lambda": s} for s in (1.0, 1e2, 1e4, 1e6))),
    "LwF": Peer(
        "avalanche",
        "lwf",
        BOTH,
        tuple({"alpha": a, "temperature": t} for a, t in ((0.1, 2.0), (1.0, 2.0), (1.0, 1.0), (10.0, 2.0))),
    ),
    "PackNet": Peer("avalanche", "packnet", ("task",), tuple({"prune_proportion": p} for p in (0.5, 0.75, "equal"))),
    "HAT": Peer(
        "clarena",
        "hat",
        ("task",),
        tuple({"mask_sparsity_reg_factor": f} for f in (0.25, 0.75, 2.0)),
        rates=(*ADAM, ("SGD", 0.05)),
        fixed={"s_max": 400.0, "clamp_threshold": 50.0},
    ),
    "DER++, 200 images": Peer("avalanche", "der", ("class",), DER, fixed={"mem_size": 200}),
    "DER++, 500 images": Peer(
        "avalanche", "der", ("class",), DER, fixed={"mem_size": 500}, chosen_as="DER++, 200 images"
    ),
    "SLDA, features of the first task": Peer(
        "avalanche", "slda", ("class",), SHRINKAGE, rates=ADAM[:1], fixed={"features": "network"}
    ),
    "SLDA, pixels": Peer(
        "avalanche",
        "slda",
        ("class",),
        SHRINKAGE,
        rates=ADAM[:1],
        fixed={"features": "pixels"},
        chosen_as="SLDA, features of the first task",
    ),
}


def main() -> None:
    parser = options_parser()
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), help="run and tabulate these only")
    options = parser.parse_args()
    if options.choose:
        choose(options)
        return
    chosen = json.loads(CHOSEN.read_text())
    found = {(name, seed): test(options, name, seed, chosen) for seed in options.seeds for name in options.peers}
    write_table(found, options.peers, options.seeds)


def choose(options: argparse.Namespace) -> None:
    """The best strength at the first learning rate, then the best of the other rates with it; seed 0."""
    asked = [name for name in options.peers if PEERS[name].chosen_as is None]
    tried: dict[tuple[str, str], list[dict]] = {(name, s): [] for name in asked for s in PEERS[name].scenarios}
    for candidates in (_strengths, _rates):
        for library in sorted({PEERS[name].library for name in asked}):
            _try(
                options, library, {k: candidates(*k, tried[k]) for k in tried if PEERS[k[0]].library == library}, tried
            )
    chosen = json.loads(CHOSEN.read_text()) if CHOSEN.exists() else {}
    for name in asked:
        chosen[name] = {s: {**_best(tried[name, s]), "tried": tried[name, s]} for s in PEERS[name].scenarios}
    CHOSEN.write_text(json.dumps(chosen, indent=2) + "\n")
    write_chosen({name: chosen[name] for name in PEERS if name in chosen})


def _strengths(name: str, scenario: str, tried: list[dict]) -> list[dict]:
    optimizer, rate = PEERS[name].rates[0]
    return [{"options": strength, "optimizer": optimizer, "lr": rate} for strength in PEERS[name].strengths]


def _rates(name: str, scenario: str, tried: list[dict]) -> list[dict]:
    strength = _best(tried)["options"]
    return [{"options": strength, "optimizer": optimizer, "lr": rate} for optimizer, rate in PEERS[name].rates[1:]]


def _best(tried: list[dict]) -> dict:
    return max(tried, key=lambda candidate: candidate["accuracy"])


def _try(options: argparse.Namespace, library: str, planned: dict[tuple[str, str], list[dict]], tried: dict) -> None:
    """Adds the candidates with what they reached on the validation images, all in one process."""
    pairs = [(key, candidate) for key, candidates in planned.items() for candidate in candidates]
    jobs = {}
    for (name, scenario), candidate in pairs:
        values = [*candidate["options"].values(), candidate["optimizer"], candidate["lr"]]
        label = "-".join(map(str, ["choose", PEERS[name].method, scenario, *values]))
        jobs[label] = _job(PEERS[name], scenario, candidate, 0, judge="val", **CHOICE)
    for (key, candidate), result in zip(pairs, run(options, library, jobs), strict=True):
        tried[key].append({**candidate, "accuracy": result["told" if key[1] == "task" else "untold"]})


def test(options: argparse.Namespace, name: str, seed: int, chosen: dict[str, Any]) -> dict[str, dict]:
    """The results of a peer by scenario, on the test images."""
    peer, jobs = PEERS[name], {}
    for scenario in peer.scenarios:
        choice = chosen[peer.chosen_as or name][scenario]
        label = f"{name.replace(' ', '-').replace(',', '')}-{scenario}-{seed}"
        jobs[label] = _job(peer, scenario, choice, seed, judge="test", epochs=17, limit=None)
    return dict(zip(peer.scenarios, run(options, peer.library, jobs), strict=True))


def _job(peer: Peer, scenario: str, choice: dict[str, Any], seed: int, **rest: Any) -> dict[str, Any]:
    return {
        "method": peer.method,
        "scenario": scenario,
        "options": {**peer.fixed, **choice["options"]},
        "optimizer": choice["optimizer"],
        "lr": choice["lr"],
        "seed": seed,
        **rest,
    }


def run(options: argparse.Namespace, library: str, jobs: dict[str, dict]) -> list[dict]:
    """The results of jobs in a library's environment; what was run before with the same options is not run again."""
    folder = options.runs / "peers"
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name}.json" for name in jobs}
    missing = [name for name in jobs if not _done(files[name], jobs[name])]
    if missing:
        place = {"data_dir": str(Path(options.data_dir).resolve())}
        todo = [{"job": {**jobs[name], **place}, "result": str(files[name].resolve())} for name in missing]
        line = [str(environment(folder, library)), str(HERE / "run.py"), library, json.dumps(todo)]
        done = subprocess.run(
            line, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{', '.join(missing)}\n{done.stderr}")
        print(*missing, sep="\n", flush=True)
    return [json.loads(file.read_text()) for file in files.values()]


def _done(file: Path, job: dict[str, Any]) -> bool:
    return file.exists() and json.loads(file.read_text())["job"] == job


def environment(folder: Path, library: str) -> Path:
    """The interpreter of a library's environment, made once; it holds this project too, for its data."""
    place = folder / f"{library}-environment"
    python = place.resolve() / "bin" / "python"
    if not (place / "installed").exists():
        print(f"environment of {library}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", place], check=True)
        install = [python, "-m", "pip", "install", "--quiet", "--requirement", HERE / f"{library}.txt"]
        subprocess.run([*install, "--editable", HERE.parent.parent], check=True)
        (place / "installed").touch()
    return python


def write_table(found: dict[tuple[str, int], dict[str, dict]], names: list[str], seeds: list[int]) -> None:
    rows = [_row(name, [found[name, seed] for seed in seeds]) for name in names]
    versions: dict[str, str] = {}
    for results in found.values():
        for result in results.values():
            versions |= result["versions"]
    caption = ", ".join(f"{name} {number.split('+')[0]}" for name, number in versions.items())
    head = ["method", "task-incremental %", "class-incremental %", "each seed", "forgetting", "numbers kept", "seconds"]
    write_section("peers", f"{caption}; seeds {', '.join(map(str, seeds))}.\n\n{markdown(head, rows)}")


def _row(name: str, results: list[dict[str, dict]]) -> list[str]:
    told = [next(iter(r.values())) for r in results]
    untold = [r["class"]["untold"] for r in results if "class" in r]
    each = untold or [t["told"] for t in told]
    kept = mean(t["kept"] for t in told)
    return [
        name,
        percent([t["told"] for t in told]),
        percent(untold) if untold else "needs the task",
        ", ".join(f"{100 * value:.2f}" for value in each),
        percent([t["forgetting"] for t in told]),
        f"{kept:.0f} ({100 * kept / NETWORK:.0f} %)",
        " + ".join(f"{mean(r[scenario]['seconds'] for r in results):.0f}" for scenario in results[0]),
    ]


def write_chosen(chosen: dict[str, dict[str, Any]]) -> None:
    rows = [
        [
            name,
            scenario,
            _described(choice),
            ", ".join(f"{_described(t)}: {100 * t['accuracy']:.2f}" for t in choice["tried"]),
        ]
        for name, scenarios in chosen.items()
        for scenario, choice in scenarios.items()
    ]
    write_section("peers-chosen", markdown(["method", "trained for", "chosen", "tried: % of validation images"], rows))


def _described(choice: dict[str, Any]) -> str:
    options = " ".join(
        f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in choice["options"].items()
    )
    return f"{options} {choice['optimizer']} {choice['lr']:g}"


if __name__ == "__main__":
    main()
