import json
import os
import subprocess
import sys
import time

import pytest
import torch
from commands import forked, here

from lightning_cf.cli import sweep

pytestmark = pytest.mark.filterwarnings("ignore:.*fork")

SMALL = ["epochs=2", "invariance_epochs=1", "model.network.hidden=[40]", "compare=false"]
TWO, INFERRED = "tasks.order=[0,1,2,3]", "task_inference=auto"


def command(*arguments, **options):
    line = [sys.executable, "-m", "lightning_cf", *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=300, check=False, **options)


def run(folder, *arguments):
    done = command(f"run={folder}", *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "result.json").read_text()), done


def test_the_default_command_compares_three_methods_and_leaves_results_and_pictures(tmp_path):
    result, done = run(tmp_path / "run", "epochs=6", "invariance_epochs=3", "model.network.hidden=[80]")
    assert all(word in done.stdout for word in ("exact isolation", "perturbation only", "plain fine-tuning"))
    assert result["tasks"] == ["0-1", "2-3", "4-5", "6-7", "8-9"]
    assert result["average_accuracy"] > 0.95
    assert result["forgetting"] == 0.0
    assert set(result["compare"]) == {"perturb", "finetune"}
    assert all(free > 0 for shares in result["capacity"].values() for free in shares[:4])
    assert result["config"]["epochs"] == 6
    for name in ("accuracy_matrix", "forgetting", "capacity"):
        assert (tmp_path / "run" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert "%|" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["partition.threshold=0.7", "partition.measure=weight", "partition.similarity_matrix=true"],
        ["tasks=permuted_digits", "tasks.count=2", "tasks.batch_size=128"],
        pytest.param(["tasks=rotated_digits", "tasks.count=3", "tasks.batch_size=128"], marks=pytest.mark.slow),
        ["tasks.order=[9,7,5,3,1,8]", "tasks.classes_per_task=3", "method=joint"],
        ["model=cnn", "model.network.channels=[8,12]"],
        ["model.network.hidden=[]"],
        pytest.param(
            ["model=resnet", "model.network.channels=[8,12]", "logger=csv", "trainer.log_every_n_steps=1"],
            marks=pytest.mark.slow,
        ),
        pytest.param(["partition=literal", "invariance=noise", "isolation=perturb"], marks=pytest.mark.slow),
        ["isolation=perturb", "invariance=composed", "subspace=random", "subspace.dimensions=0.25", INFERRED],
        ["isolation=perturb", "invariance=mixture", "subspace=learned", "subspace.steps=5"],
        ["partition.every_n_epochs=1", "partition.clusters=components", "partition.representative=random"],
        ["partition.when_below=10.0", "invariance.every_n_epochs=2", "unit_pictures=none"],
    ],
)
def test_every_group_runs_from_any_folder(tmp_path, arguments, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = [x for x in SMALL if not (x.startswith("model.") and any(a.startswith("model=") for a in arguments))]
    small += [] if any(a.startswith("tasks") for a in arguments) else [TWO]
    small += [] if INFERRED in arguments else ["task_inference=none"]  # which takes most of the time
    drawn = "partition.similarity_matrix=true" in arguments
    status, _, errors = here(monkeypatch, capsys, "run=run", *small, *arguments, drawn=drawn)
    assert status == 0, errors
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert len(result["accuracy_matrix"]) == (1 if "method=joint" in arguments else len(result["tasks"]))
    if "partition.threshold=0.7" in arguments:
        assert "lightning-cf: warning: Task '0-1': threshold=0.7 finds too little redundancy" in errors
    if "logger=csv" in arguments:
        assert list((tmp_path / "run").rglob("metrics.csv"))
    if "method=joint" not in arguments:
        folders = sorted((tmp_path / "run").glob("*/tasks/*"))
        assert [folder.name[3:] for folder in folders] == result["tasks"]
        for folder in folders:
            found, pictures = set(os.listdir(folder)), {"units.png", "similarity.png"}
            last = folder == folders[-1] and "unit_pictures=none" not in arguments
            assert {"checkpoint.ckpt", "partition.json"} <= found
            assert found & pictures == (pictures if last and "model.network.hidden=[]" not in arguments else set())
            assert bool(list(folder.rglob("similarity/*.npy"))) == ("partition.similarity_matrix=true" in arguments)
    if "partition.every_n_epochs=1" in arguments:
        assert all(len(record["claims"]) > 1 for record in result["partition"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["isolation=some"], ["isolation", "exact, perturb", "'some'"]),
        (["unit_pictures=some"], ["unit_pictures", "last, all, none", "'some'"]),
        (["partition.measure=size"], ["measure", "weight, update, activation", "'size'"]),
        (["partition.threshold=7"], ["threshold", "[-1, 1]", "7"]),
        (["partition.exclude=[network.7]"], ["exclude", "'network.7'", "network.1, network.3"]),
        (["epochs=0"], ["epochs", "at least 1", "0"]),
        (["tasks.classes_per_task=3"], ["10 classes", "3", "order="]),
        (["model.network.classes=6"], ["'6-7'", "output 6", "6 columns", "Widen"]),
        (["model.network.hidden=[3]"], ["'network.1'", "3 units", "5 tasks", "Widen"]),
        (["subspace=random", "subspace.dimensions=0"], ["dimensions", "share in (0, 1]", "0"]),
        (["subspace=given", "subspace.bases=none.pt"], ["none.pt", "no file"]),
        (
            ["partition.every_n_steps=5", "partition.every_n_epochs=2"],
            ["every_n_steps", "every_n_epochs", "contradict"],
        ),
        (["pretrained=none.ckpt"], ["pretrained", "none.ckpt", "no file"]),
        (["+trainer.max_epochs=3"], ["the trainer sets max_epochs=3", "epochs=12"]),
        (["devices=abc"], ["devices", "int > 0"]),
        (["seed=abc"], ["seed", "whole number", "'abc'"]),
        (["~invariance"], ["invariance"]),
        (["model=cnn", "task_inference.strategy=first_layer"], ["first_layer", "a first layer that is linear", "auto"]),
        (["tasks=split_mnist", "data_dir=nowhere"], ["train-images-idx3-ubyte", "nowhere", "data_dir"]),
    ],
)
def test_bad_input_ends_with_status_1_a_clear_line_and_no_traceback(tmp_path, arguments, words, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, _, errors = here(monkeypatch, capsys, *arguments, "run=run")
    assert status == 1
    assert all(word in errors for word in words), errors
    assert "Traceback" not in errors
    assert len(errors.strip().splitlines()) == 1 or "hydra" in errors.lower()
    assert not (tmp_path / "run" / "config.json").exists()


def test_an_option_that_nothing_reads_is_named(tmp_path, monkeypatch, capsys):
    line = [f"run={tmp_path / 'run'}", *SMALL, TWO, "task_inference=none"]
    status, _, errors = here(monkeypatch, capsys, *line, "+lr=0.1", "+width=12", "model.network.hidden=[${width}]")
    assert status == 0, errors
    assert errors.count("warning: Nothing reads") == 1
    assert "warning: Nothing reads lr=. Options lie in groups" in errors


def test_what_cannot_be_made_leaves_the_folder_to_the_command_that_follows(tmp_path, monkeypatch, capsys):
    line = [f"run={tmp_path / 'run'}", *SMALL, TWO, "task_inference=none"]
    for wrong in ("model.optimizer.lr=x", "model.optimizer._target_=torch.nn.Linear"):
        assert here(monkeypatch, capsys, *line, wrong)[0] == 1
        assert not (tmp_path / "run" / "config.json").exists()
    assert here(monkeypatch, capsys, *line)[0] == 0


def test_callbacks_of_the_configured_trainer_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    timer = "[{_target_:lightning.pytorch.callbacks.LambdaCallback,on_fit_end:{_target_:test_cli.note,_partial_:true}}]"
    NOTES.clear()
    arguments = [*SMALL, "run=run", "tasks.order=[0,1]", f"+trainer.callbacks={timer}"]
    status, _, errors = here(monkeypatch, capsys, *arguments)
    assert status == 0, errors
    assert len(NOTES) == 2  # LEARN and INVARIANCE of one task


NOTES = []


def note(trainer, module):
    NOTES.append(trainer.max_epochs)


@pytest.mark.parametrize("step", ["partition", "invariance", "masking"])
def test_steps_are_left_out_from_the_command_line(tmp_path, monkeypatch, capsys, step):
    monkeypatch.chdir(tmp_path)
    status, _, errors = here(monkeypatch, capsys, *SMALL, "run=run", TWO, "task_inference=none", f"{step}=none")
    assert status == 0, errors
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert bool(result["partition"]) == (step != "partition")
    assert result["config"][step] is None


def test_a_folder_with_other_settings_is_refused(tmp_path, monkeypatch, capsys):
    folder = f"run={tmp_path / 'run'}"
    assert here(monkeypatch, capsys, folder, *SMALL, "tasks.order=[0,1]")[0] == 0
    status, _, errors = here(monkeypatch, capsys, folder, *SMALL, "tasks.order=[0,1]", "seed=1")
    assert status == 1
    assert "seed=0, not 1" in errors


@pytest.mark.usefixtures("one_thread")
def test_a_killed_run_goes_on_after_its_last_finished_phase(tmp_path, monkeypatch, capsys):
    line = [*SMALL, TWO, "task_inference=none"]
    assert here(monkeypatch, capsys, f"run={tmp_path / 'whole'}", *line)[0] == 0
    whole = json.loads((tmp_path / "whole" / "result.json").read_text())
    process = forked(f"run={tmp_path / 'cut'}", *line)
    for _ in range(6000):
        phases = tmp_path / "cut" / "exact" / "state.pt"
        if process.exitcode is not None:
            pytest.fail("the run ended before it could be killed")
        if phases.exists() and _finished(phases) >= 4:
            break
        time.sleep(0.005)
    process.kill()
    process.join()
    assert not (tmp_path / "cut" / "result.json").exists()
    status, _, errors = here(monkeypatch, capsys, f"run={tmp_path / 'cut'}", *line)
    assert status == 0, errors
    resumed = json.loads((tmp_path / "cut" / "result.json").read_text())
    assert resumed["forgetting"] == 0.0
    assert len(resumed["accuracy_matrix"]) == 2
    assert resumed["weights_sha256"] == whole["weights_sha256"]


def _finished(path):
    return len(torch.load(path, weights_only=True)["progress"]["finished"])


def job(command, environment):
    """A job of a sweep in a process that need not import anything anew."""
    assert command[:3] == [sys.executable, "-m", "lightning_cf"]
    process = forked(*command[3:])
    process.join()
    return process.exitcode


@pytest.mark.usefixtures("one_thread")
def test_a_sweep_gives_for_each_job_what_the_job_alone_gives(tmp_path, monkeypatch, capsys):
    small = ["epochs=1", "invariance_epochs=1", "model.network.hidden=[12]", "compare=false"]
    small += ["tasks.order=[0,1]", "task_inference=none"]

    monkeypatch.setattr(sweep, "_status", job)
    status, told, errors = here(
        monkeypatch, capsys, "-m", f"run={tmp_path / 'sweep'}", *small, "partition.threshold=0.5,auto"
    )
    assert status == 0, errors
    jobs = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert len(jobs) == 2
    for found, threshold in zip(jobs, ("0.5", "auto"), strict=True):
        folder = tmp_path / threshold
        assert here(monkeypatch, capsys, f"run={folder}", *small, f"partition.threshold={threshold}")[0] == 0
        assert found["weights_sha256"] == json.loads((folder / "result.json").read_text())["weights_sha256"]
        assert f"partition.threshold={threshold}" in told.split("average accuracy")[-1]
    assert jobs[0]["weights_sha256"] != jobs[1]["weights_sha256"]


@pytest.mark.slow
def test_a_search_gives_each_job_all_of_its_configuration(tmp_path, monkeypatch, capsys):
    one = ["hydra.sweeper.params.invariance=shear", "hydra.sweeper.params.invariance_epochs=1"]
    small = [x for x in SMALL if not x.startswith(("invariance_epochs", "compare"))]
    line = ["hparams_search=perturbation", f"run={tmp_path}", *small, *one, "tasks.order=[0,1]", "task_inference=none"]
    status, _, errors = here(monkeypatch, capsys, *line)
    assert status == 0, errors
    (found,) = json.loads((tmp_path / "sweep.json").read_text())
    assert found["status"] == 0
    result = json.loads((tmp_path / "0" / "result.json").read_text())
    assert result["config"]["isolation"] == "perturb"
    assert result["config"]["invariance"]["perturbation"]["_target_"] == "lightning_cf.Shear"
    assert (tmp_path / "0" / "perturb").is_dir()


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_sweep_names_a_metric_that_results_do_not_have(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "_status", job)
    line = ["-m", f"run={tmp_path}", *SMALL, "tasks.order=[0,1]", "task_inference=none"]
    status, _, errors = here(monkeypatch, capsys, *line, "optimized_metric=tasks", "seed=0")
    assert status == 1
    assert "optimized_metric='tasks' is no number" in errors
    assert "Traceback" not in errors


@pytest.mark.slow
def test_two_processes_partition_in_training_and_learn_one_sub_space(tmp_path):
    options = ["epochs=4", "invariance_epochs=3", "compare=false", "model.network.hidden=[40]", TWO]
    options += [
        "partition.every_n_steps=7",
        "isolation=perturb",
        "subspace=learned",
        "subspace.steps=4",
        "task_inference=none",
    ]
    two, _ = run(tmp_path, *options, "trainer=ddp", "devices=2")
    assert all(len(record["claims"]) > 1 for record in two["partition"])
    assert two["average_accuracy"] > 0.8


def test_two_processes_forget_nothing_and_agree_with_one(tmp_path, monkeypatch, capsys):
    options = ["epochs=6", "invariance_epochs=3", "compare=false", "model.network.hidden=[80]", TWO]
    two, done = run(tmp_path / "two", *options, "trainer=ddp", "devices=2")
    assert here(monkeypatch, capsys, f"run={tmp_path / 'one'}", *options)[0] == 0
    one = json.loads((tmp_path / "one" / "result.json").read_text())
    assert two["forgetting"] == 0.0
    assert two["average_accuracy"] >= one["average_accuracy"] - 0.1  # half as many steps; 0.03 apart with other seeds
    assert done.stdout.count("task-incremental") == 1
    assert json.loads((tmp_path / "two" / "exact" / "settings.json").read_text())["processes"] == 2
