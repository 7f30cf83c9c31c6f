"""The command line's own guard of a folder: config.json, and what each method's state holds when that is gone."""

import json
import shutil

import pytest
from commands import here

from lightning_cf.cli.sweep import _job
from lightning_cf.utilities.files import read_json

TINY = [
    *("epochs=1", "invariance_epochs=1", "model.network.hidden=[12]", "compare=false", "tasks.order=[0,1]"),
    "task_inference=none",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["lightning-cf", f"run={folder}", *TINY])
        capture = type("Capture", (), {"readouterr": staticmethod(lambda: ("", ""))})
        assert here(patch, capture, f"run={folder}", *TINY)[0] == 0
    return folder


def delete(path):
    path.unlink()


def truncate(path):
    path.write_bytes(path.read_bytes()[:50])


def flip(path):
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))


def swap(path):
    path.write_text(json.dumps({"seed": 3}))


@pytest.mark.parametrize("harm", [delete, truncate, flip])
def test_the_guard_holds_without_config_json(finished, tmp_path, monkeypatch, capsys, harm):
    shutil.copytree(finished, tmp_path / "run")
    harm(tmp_path / "run/config.json")
    status, _, errors = here(monkeypatch, capsys, f"run={tmp_path / 'run'}", *TINY, "seed=1")
    assert status == 1
    assert "seed=0, not 1" in errors
    assert ("config.json is damaged" in errors) == (harm is not delete)
    status, _, errors = here(monkeypatch, capsys, f"run={tmp_path / 'run'}", *TINY)
    assert status == 0, errors
    assert read_json(tmp_path / "run/config.json")["seed"] == 0
    assert json.loads((tmp_path / "run/result.json").read_text())["weights_sha256"] == weights_of(finished)


def weights_of(folder):
    return json.loads((folder / "result.json").read_text())["weights_sha256"]


def test_another_run_s_config_is_named(finished, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished, tmp_path / "run")
    swap(tmp_path / "run/config.json")
    status, _, errors = here(monkeypatch, capsys, f"run={tmp_path / 'run'}", *TINY)
    assert (status, "seed=3, not 0 (config.json)" in errors) == (1, True), errors


def test_allow_names_options_and_what_they_lead_to(finished, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished, tmp_path / "run")
    arguments = [f"run={tmp_path / 'run'}", *TINY, "tasks.batch_size=16"]
    status, _, errors = here(monkeypatch, capsys, *arguments)
    assert (status, "tasks.batch_size=32, not 16" in errors) == (1, True), errors
    status, _, errors = here(monkeypatch, capsys, *arguments, "allow=[tasks.batch_size]")
    assert (status, "data.0-1.train.batch_size=32, not 16" in errors) == (1, True), errors
    status, _, errors = here(monkeypatch, capsys, *arguments, "allow=[tasks.batch_size,data]")
    assert (status, "goes on with what allow= lets differ" in errors) == (0, True), errors


@pytest.mark.parametrize(
    ("allow", "words"),
    [("[nothing]", "allow names 'nothing', which is neither an option nor"), ("seed", "allow must be a list of names")],
)
def test_what_allow_cannot_name_is_refused(tmp_path, monkeypatch, capsys, allow, words):
    status, _, errors = here(monkeypatch, capsys, f"run={tmp_path / 'run'}", *TINY, f"allow={allow}")
    assert (status, words in errors) == (1, True), errors


@pytest.mark.parametrize("name", ["job.json", "result.json"])
@pytest.mark.parametrize("harm", [delete, truncate])
def test_a_job_whose_files_are_damaged_counts_as_failed(tmp_path, name, harm):
    from lightning_cf.utilities.files import write_json

    result = {
        "average_accuracy": 1.0,
        "forgetting": 0.0,
        "backward_transfer": 0.0,
        "weights_sha256": "",
        "capacity": {},
    }
    write_json(tmp_path / "job.json", {"overrides": ["a=1"], "status": 0})
    (tmp_path / "result.json").write_text(json.dumps(result))
    assert _job(tmp_path)["status"] == 0
    harm(tmp_path / name)
    job = _job(tmp_path)
    assert job["status"] != 0
    assert name in job["error"]
