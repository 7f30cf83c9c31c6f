"""The command line: ``lightning-cf [VERB] [KEY=VALUE ...]``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import hydra
import omegaconf
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from lightning_cf.cli import doctor
from lightning_cf.cli.configuration import FOLDER, unread
from lightning_cf.cli.environment import environment_variable
from lightning_cf.cli.progress_bar import RunBar
from lightning_cf.cli.run_log import logged_warnings
from lightning_cf.cli.stopping import check_stopped, ended_by_signals, going_on_in
from lightning_cf.cli.sweep import run_job
from lightning_cf.cli.telling import fail
from lightning_cf.errors import ContinualError, RunWarning, check_choice, check_count, check_text, warn
from lightning_cf.lightning_api import Trainer
from lightning_cf.reporting.result_pictures import write_pictures
from lightning_cf.reporting.tables import print_summary
from lightning_cf.reporting.unit_pictures import PICTURED, write_unit_pictures
from lightning_cf.sequence.comparison import VARIABLE, differences
from lightning_cf.sequence.preflight import Method, check_root
from lightning_cf.sequence.result import Result
from lightning_cf.sequence.runner import SequentialTaskRunner
from lightning_cf.utilities.files import read_json, write_atomically, write_json
from lightning_cf.utilities.randomness import isolated_generators, seed_all

VERBS = ("train", "doctor")

_ANYWHERE = (
    "run",
    "allow",
    "command",
    "compare",
    "optimized_metric",
    "unit_pictures",
    "logger",
    "data_dir",
    "devices",
    "nodes",
    "pretrained",
)
"""Options that do not change what a method's run finds, or that its runner compares by what they lead to."""

_FREE = ("run", "allow", "unit_pictures")
"""Options in which a start may differ from the folder's run without a word."""

VERSION_BASE = {"version_base": "1.3"} if hydra.__version__.startswith("1.3.") else {}
"""How Hydra is asked to behave as 1.3 does: from 1.4 on it knows no other way, and warns where it is asked."""

_UNCHECKED = "UNSAFE_DISABLE_EXECUTION_CHECKS"
_ANY_CLASS = {"execution_whitelist": getattr(hydra.utils, _UNCHECKED)} if hasattr(hydra.utils, _UNCHECKED) else {}
"""From 1.4 on Hydra asks which classes a configuration may name: any, as the code may of the one who runs it."""

_FULL = "HYDRA_FULL_ERROR"


def main() -> None:
    """Entry point. A verb is rewritten to ``command=VERB``, since distributed children run the same arguments."""
    # Hydra lets errors through where all of them is wanted; then we tell.
    with ended_by_signals(), environment_variable(_FULL, "1") as wanted:
        try:
            _main(wanted)
        except Exception as error:
            if wanted not in (None, "", "0"):
                raise
            fail(error, foreseen=True)  # outside of a job it is Hydra that reads what the user wrote


def _main(wanted: str | None) -> None:
    if len(sys.argv) > 1 and sys.argv[1].isidentifier():
        verb = check_choice("lightning-cf", "verb", sys.argv[1], VERBS)
        sys.argv[1] = f"command={verb}"
        if verb == "doctor":
            print(doctor.environment(), flush=True)
            if len(sys.argv) == 2:
                return
            if not {"-m", "--multirun"}.isdisjoint(sys.argv):
                raise ContinualError("lightning-cf: doctor looks at one network; leave -m out.")
            # It leaves nothing behind, also where an experiment would sweep.
            sys.argv[2:2] = ["hydra.mode=RUN", "hydra.run.dir=.", "hydra.output_subdir=null"]

    @hydra.main(**VERSION_BASE, **_ANY_CLASS, config_path=str(FOLDER), config_name="config")
    def job(config: DictConfig) -> float | None:
        return _job(config, wanted)

    job()


def _job(config: DictConfig, wanted: str | None) -> float | None:
    """One job: this process's own, or one of a multirun in a child process; gives sweepers what they optimise."""
    chosen = HydraConfig.get()
    sweeps, folder = chosen.mode == RunMode.MULTIRUN, Path(chosen.runtime.output_dir)
    with going_on_in(Path(chosen.sweep.dir).absolute() if sweeps else folder), environment_variable(_FULL, wanted):
        try:
            if sweeps:
                return run_job(folder, config.optimized_metric)
            if config.command == "doctor":
                print(_diagnosis(config))
            else:
                train(config, folder)
        except Exception as error:
            check_stopped()
            if wanted not in (None, "", "0"):
                raise
            fail(error)
    return None


def train(config: DictConfig, root: Path) -> dict[str, Any]:
    """Runs the configured method and, with ``compare``, the others; writes ``result.json`` and pictures.

    Args:
        config: as composed by Hydra.
        root: the run's folder.

    Returns:
        what ``result.json`` holds.
    """
    with RunBar() as bar, logged_warnings(root, bar):
        return _train(config, root, _checked(config, root), bar)


def _train(config: DictConfig, root: Path, resolved: dict[str, Any], bar: RunBar) -> dict[str, Any]:
    chosen = _name(config.method, config.isolation)
    names = [chosen, *(name for name in ("exact", "perturb", "finetune") if config.compare and name != chosen)]
    # Every method's runner exists, and its options are checked, before the first one trains.
    runners: dict[str, SequentialTaskRunner] = {}
    for name in names:
        bar.title = name
        runners[name] = _runner(config, name, root / name, bar)
    for bar.title, runner in runners.items():
        runner.start()
    first_process = runners[chosen].host.is_global_zero
    if first_process:
        root.mkdir(parents=True, exist_ok=True)
        write_json(root / "config.json", resolved)
    tasks = next(iter(runners.values())).tasks
    fits = sum(1 if runner.method == "joint" else len(tasks) for runner in runners.values())
    bar.total = fits * (config.epochs + config.invariance_epochs)
    results: dict[str, Result] = {}
    for bar.title, runner in runners.items():
        results[bar.title] = runner.run()
        check_stopped()
    bar.close()
    others = {name: result for name, result in results.items() if name != chosen}
    document = results[chosen].as_dict(compare=others, seed=config.seed, config=resolved)
    if first_process:
        write_atomically(root / "result.json", json.dumps(document, indent=2))
        write_pictures(results, root)
        write_unit_pictures(root / chosen / "tasks", config.unit_pictures)
        print_summary(results, root)
    return document


def _diagnosis(config: DictConfig) -> str:
    """How the configured network is traced; checked as a run checks it before it trains."""
    with TemporaryDirectory() as folder, RunBar() as bar, logged_warnings(Path(folder), bar):
        _checked(config, Path(folder))
        # One process on any machine: what is traced is the same on all.
        alone = partial(Trainer, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
        name = _name(config.method, config.isolation)
        runner = _runner(config, name, Path(folder) / "run", bar, trainer=alone)
        runner.start()
        runner.lock.release()
        return doctor.network(runner)


def _runner(
    config: DictConfig, name: str, root: Path, bar: RunBar, *, trainer: Callable[..., Trainer] | None = None
) -> SequentialTaskRunner:
    options: Any = OmegaConf.to_container(config.tasks, resolve=True)
    tasks = instantiate({key: value for key, value in options.items() if key not in ("shape", "classes")})
    with isolated_generators():
        seed_all(config.seed)
        module = instantiate(config.model)
    method: Method = "finetune" if name == "finetune" else "joint" if name == "joint" else "partition"
    # Converted, since a list of perturbations would else become a configuration again.
    runner = SequentialTaskRunner(
        module,
        tasks,
        trainer=trainer or _trainer_factory(config),
        epochs=config.epochs,
        invariance_epochs=config.invariance_epochs,
        partition=instantiate(config.partition, _convert_="all"),
        invariance=instantiate(config.invariance, _convert_="all"),
        masking=instantiate(config.masking, _convert_="all"),
        task_inference=instantiate(config.task_inference, _convert_="all"),
        callbacks=[bar.callback()],
        isolation="perturb" if name == "perturb" else "exact",
        method=method,
        pretrained=config.pretrained or False,
        score_on=config.score_on,
        seed=config.seed,
        root=root,
        allow=[name for name in _allowed(config) if name.partition(".")[0] in VARIABLE],
    )
    runner.allow += [f"configuration.{name}" for name in _allowed(config)]
    resolved: Any = OmegaConf.to_container(config, resolve=True)
    runner.configuration = {key: value for key, value in resolved.items() if key not in _ANYWHERE}
    return runner


def _allowed(config: DictConfig) -> list[str]:
    """What may differ from the folder's run, by a name of the configuration or of what the runner compares."""
    allow: Any = OmegaConf.to_container(config.allow) if OmegaConf.is_config(config.allow) else config.allow
    if not isinstance(allow, list) or not all(isinstance(name, str) for name in allow):
        raise ContinualError(f"lightning-cf: allow must be a list of names such as allow=[epochs], got {allow!r}.")
    for name in allow:
        if name.partition(".")[0] not in (*config, *VARIABLE):
            raise ContinualError(
                f"lightning-cf: allow names '{name}', which is neither an option nor one of {', '.join(VARIABLE)}."
            )
    return allow


def _trainer_factory(config: DictConfig) -> Callable[..., Trainer]:
    make, make_logger = instantiate(config.trainer, _convert_="all"), instantiate(config.logger)
    for name, made in (("trainer", make), ("logger", make_logger)):
        if not isinstance(made, partial) and (made or name == "trainer"):  # an empty logger is none
            raise ContinualError(f"lightning-cf: {name} must make one for each phase: set {name}._partial_=true.")

    def trainer(**options: Any) -> Trainer:
        logger = make_logger(save_dir=options["default_root_dir"]) if make_logger else False
        made: Trainer = make.func(logger=logger, **options)
        return made

    return partial(trainer, **make.keywords)  # so that the runner sees what the configuration sets


def _name(method: str, isolation: str) -> str:
    return isolation if method == "partition" else method


def _checked(config: DictConfig, root: Path) -> dict[str, Any]:
    """The resolved configuration, refused where another one finished a phase in the run's folder."""
    check_choice("lightning-cf", "command", config.command, VERBS)
    check_count("lightning-cf", "seed", config.seed, least=0)
    check_choice("lightning-cf", "method", config.method, ("partition", "finetune", "joint"))
    check_choice("lightning-cf", "isolation", config.isolation, ("exact", "perturb"))
    check_choice("lightning-cf", "unit_pictures", config.unit_pictures, PICTURED)
    if not isinstance(config.compare, bool):
        raise ContinualError(f"lightning-cf: compare must be true or false, got {config.compare!r}.")
    if config.pretrained is not None and not isinstance(config.pretrained, str):
        raise ContinualError(f"lightning-cf: pretrained must be a checkpoint or null, got {config.pretrained!r}.")
    check_text("lightning-cf", "optimized_metric", config.optimized_metric)
    for name in ("tasks", "model", "trainer"):
        if not isinstance(config[name], DictConfig):
            raise ContinualError(f"lightning-cf: {name} must be one of the choices of its group, got {config[name]!r}.")
    for name in unread(config):
        warn(f"Nothing reads {name}=. Options lie in groups, such as model.optimizer.lr: see --help.", RunWarning)
    resolved: Any = OmegaConf.to_container(config, resolve=True)
    resolved["run"] = str(root)
    allow = _allowed(config)
    kept = root / "config.json"
    if kept.exists() and any(root.glob("*/state*.pt")):
        try:
            found = read_json(kept)
        except ContinualError:
            text = f"{kept} is damaged; what the methods' states hold is compared instead."
            warn(text, RunWarning)
            return dict(resolved)
        compared = {key: value for key, value in resolved.items() if key in found and key not in _FREE}
        for name, was, now in differences({key: found[key] for key in compared}, compared):
            if not any(name == each or name.startswith(f"{each}.") for each in allow):
                raise ContinualError(
                    f"lightning-cf: the folder {root} holds a run with {name}={was!r}, not {now!r} (config.json)."
                    " Start it again with the same settings, or choose another folder with run=FOLDER; allow=[...]"
                    " names what is meant to differ."
                )
    return dict(resolved)


def _run_folder(run: Any) -> str:
    """The folder of a run, for Hydra, which else makes whatever stands there; an empty one is the current folder."""
    if isinstance(run, bool) or not isinstance(run, (str, int, float)) or not str(run).strip():
        raise ContinualError(f"lightning-cf: run must be a folder, such as run=runs/first, got {run!r}.")
    check_root(Path(str(run)))
    return str(run)


# Of two names for it, OmegaConf 2.3 warns of one and 2.4 of the other.
_old = omegaconf.__version__.startswith("2.3.")
_register: Any = OmegaConf.register_new_resolver if _old else OmegaConf.register_resolver
_register("run_folder", _run_folder, replace=True)
