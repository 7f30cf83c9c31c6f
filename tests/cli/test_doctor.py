import sys
from functools import partial

import jaxtyping
import pytest
import torch
from lightning.pytorch import Trainer
from runs import Net, net, pair
from torch import nn

import lightning_cf
from lightning_cf import SequentialTaskRunner
from lightning_cf.__main__ import main
from lightning_cf.cli import doctor


def told(monkeypatch, capsys, *arguments):
    """The command in this process: exit status and what it printed."""
    monkeypatch.setattr(sys, "argv", ["lightning-cf", *arguments])
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        main()
        status = 0
    except SystemExit as error:
        status = error.code
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    return status, *capsys.readouterr()


def test_the_version_is_ours(monkeypatch, capsys):
    assert told(monkeypatch, capsys, "--version") == (0, f"lightning-cf {lightning_cf.__version__}\n", "")


def test_the_doctor_tells_versions_devices_and_place_among_processes(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    status, out, _ = told(monkeypatch, capsys, "doctor")
    lines = dict(line.split(None, 1) for line in out.splitlines())
    assert status == 0
    assert lines["lightning_cf"] == lightning_cf.__version__
    assert lines["torch"] == torch.__version__
    assert {"python", "lightning", "torchmetrics", "hydra-core", "numpy", "system"} <= lines.keys()
    assert "Lightning in use  lightning.pytorch" in out
    assert "cores" in lines["devices"]
    assert lines["WORLD_SIZE"] == "3"


@pytest.mark.filterwarnings("ignore")
def test_with_options_the_doctor_tells_how_the_network_is_traced_and_leaves_nothing(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    status, out, errors = told(
        monkeypatch, capsys, "doctor", "model=cnn", "partition.exclude=[network.features.0]", "trainer=ddp", "devices=2"
    )
    assert status == 0, errors
    rows = {line.split()[0]: line for line in out.splitlines() if line.startswith("network.")}
    assert "first task only: left out" in rows["network.features.0"]
    assert "shared out" in rows["network.features.4"]
    assert "outputs" in out
    assert "isolation=exact; later tasks can train" in out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-m", "epochs=1,2"], ["doctor", "one network", "-m"]),
        (["model=nothing"], ["model/nothing", "resnet"]),
        (["model.network.hidden=[3]"], ["'network.1'", "3 units", "Widen"]),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_a_run_would_refuse_is_refused_after_the_versions(arguments, words, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    status, out, errors = told(monkeypatch, capsys, "doctor", *arguments)
    assert status == 1
    assert lightning_cf.__version__ in out
    assert errors.startswith("lightning-cf: error: ")
    assert all(word in errors for word in words), errors
    assert not list(tmp_path.iterdir())


class Mixed(Net):
    """Normalises its units, and mixes those of another layer."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.Softmax(1), nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU())


@pytest.mark.filterwarnings("ignore")
def test_the_doctor_names_what_mixes_units(tmp_path):
    runner = SequentialTaskRunner(
        net(kind=Mixed), pair(), trainer=partial(Trainer, accelerator="cpu", logger=False), root=tmp_path
    )
    runner.start()
    runner.lock.release()
    text = doctor.network(runner)
    assert "first task only: one fate" in text
    assert "normalises units together: body.3" in text
    assert "'aten._softmax' in module 'body.1' mixes units" in text
