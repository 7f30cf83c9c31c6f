"""Every file of a run's folder, damaged, deleted or another run's: recovered from, told of, or refused."""

import json
import shutil
import warnings
from contextlib import contextmanager

import pytest
import torch
from lightning.pytorch import Callback
from runs import HARMS, pair, run_of, swap

from lightning_cf import ContinualError, PartitionRecord, RunWarning
from lightning_cf.ownership.levels import FREE
from lightning_cf.reporting.unit_pictures import write_unit_pictures
from lightning_cf.sequence.store import RunStore
from lightning_cf.utilities.files import read_json, write_json

pytestmark = pytest.mark.filterwarnings("ignore:.*no claim within the budget")

STATES = ["state.pt", "state.previous.pt"]
OF_TASKS = [
    "tasks/00-a/checkpoint.ckpt",
    "tasks/00-a/partition.json",
    "tasks/00-a/partition-0/0_body.0/owner.npy",
    "tasks/00-a/partition-0/0_body.0/direction.npy",
]


class PowerCut(Callback):
    """In the second task's INVARIANCE."""

    def on_train_start(self, trainer, pl_module):
        if trainer.datamodule.name == "b" and pl_module.ledger.tasks[-1].phase == "invariance":
            raise RuntimeError("power cut")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A finished and a half-finished run, the same of another seed, and the result of the first."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*no claim within the budget")
        return _made(tmp_path_factory.mktemp("runs"))


def _made(root):
    whole = run_of(root / "finished").run()
    run_of(root / "finished-other", seed=1).run()
    for name, options in (("half", {}), ("half-other", {"seed": 1})):
        with pytest.raises(RuntimeError, match="power cut"):
            run_of(root / name, callbacks=[PowerCut()], **options).run()
    return root, whole


def same(result, whole):
    return result.weights_sha256 == whole.weights_sha256 and torch.equal(result.accuracy.matrix, whole.accuracy.matrix)


@contextmanager
def told(*words):
    """What is said of the damage, with all warnings as one text."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    text = " ".join(str(each.message) for each in caught if issubclass(each.category, RunWarning))
    assert all(word in text for word in words), text or "nothing was said"


@pytest.mark.parametrize("harm", [*HARMS, "swap"])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("finished", name) for name in [*STATES, "settings.json", *OF_TASKS]),
        *(("half", name) for name in [*STATES, "settings.json"]),
        *(pytest.param("half", name, marks=pytest.mark.slow) for name in OF_TASKS),
    ],
)
def test_damage_never_changes_the_result_in_silence(folders, tmp_path, kind, name, harm):
    root, whole = folders
    folder = tmp_path / kind
    shutil.copytree(root / kind, folder)
    path = folder / name
    if harm == "swap":
        swap(path, root / f"{kind}-other" / name)
        if path.read_bytes() == (root / kind / name).read_bytes():
            pytest.skip("both runs have the same file")
    else:
        HARMS[harm](path)
    if (name, harm) == ("state.pt", "swap"):
        with pytest.raises(ContinualError, match=r"state\.pt is another run's than .*seed=1, not 0"):
            run_of(folder).run()
        path.unlink()  # the way out that the message names
        with told("state.pt is missing", "goes on from"):
            assert same(run_of(folder).run(), whole)
        return
    words = {
        "state.pt": ["state.pt is", "missing" if harm == "delete" else "damaged", "one phase behind"],
        "settings.json": ["settings.json is damaged"] if harm not in ("delete", "swap") else [],
        "tasks/00-a/checkpoint.ckpt": ["tasks/00-a/checkpoint.ckpt is"],
        "tasks/00-a/partition.json": ["tasks/00-a/partition.json is"],
    }.get(name, [])
    with told(*words):
        assert same(run_of(folder).run(), whole)
    assert read_json(folder / "settings.json")["seed"] == 0
    if name.endswith(".npy"):  # not needed to go on, but nobody reads it as if it were whole
        with pytest.raises(ContinualError, match="missing or damaged"):
            PartitionRecord.load(folder / "tasks/00-a")


def test_what_the_last_phase_left_is_written_anew_by_repeating_it(folders, tmp_path):
    root, whole = folders
    shutil.copytree(root / "half", tmp_path / "half")
    record = tmp_path / "half/tasks/01-b/partition.json"  # of the partition that was the last phase
    before = record.read_bytes()
    record.write_bytes(before[:-40])
    with told("partition.json is damaged, or another run's", "The phase 'partition b' is repeated"):
        assert same(run_of(tmp_path / "half").run(), whole)
    assert PartitionRecord.load(record.parent).task == "b"


def test_the_latest_checkpoint_is_written_anew(folders, tmp_path):
    root, whole = folders
    shutil.copytree(root / "finished", tmp_path / "run")
    path = tmp_path / "run/tasks/01-b/checkpoint.ckpt"
    expected = torch.load(path, weights_only=True)["state_dict"]
    path.unlink()
    with told("01-b/checkpoint.ckpt is missing; it is written anew"):
        assert same(run_of(tmp_path / "run").run(), whole)
    found = torch.load(path, weights_only=True)["state_dict"]
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    run_of(tmp_path / "run").run()  # and nothing more to say


@pytest.mark.parametrize("names", [["state.pt"], STATES])
def test_without_a_sound_state_the_error_names_all_of_them(folders, tmp_path, names):
    root, _ = folders
    shutil.copytree(root / "half", tmp_path / "half")
    for name in STATES:
        path = tmp_path / "half" / name
        if name in names:
            path.write_bytes(b"{")
        else:
            path.unlink()
    with pytest.raises(ContinualError, match=".*".join(f"{name} is damaged" for name in names) + ".*remove the folder"):
        run_of(tmp_path / "half").run()


def test_a_run_whose_states_are_gone_starts_anew_and_says_so(folders, tmp_path):
    root, whole = folders
    shutil.copytree(root / "half", tmp_path / "half")
    for name in STATES:
        (tmp_path / "half" / name).unlink()
    with told("state.pt is missing", "everything starts anew"):
        assert same(run_of(tmp_path / "half").run(), whole)


def nan(kept):
    kept["module"]["body.0.weight"][0, 0] = torch.nan


def wiped(kept):
    for owner in kept["module"]["_extra_state"]["owners"].values():
        owner.fill_(FREE)


def without_progress(kept):
    del kept["progress"]


def strange_field(kept):
    kept["progress"]["mood"] = 1


@pytest.mark.parametrize("change", [nan, wiped, without_progress, strange_field])
def test_what_was_put_into_a_state_is_not_taken(folders, tmp_path, change):
    root, whole = folders
    shutil.copytree(root / "half", tmp_path / "half")
    path = tmp_path / "half/state.pt"
    kept = torch.load(path, weights_only=True)
    change(kept)
    torch.save(kept, path)
    with told("state.pt is damaged", "state.previous.pt"):
        assert same(run_of(tmp_path / "half").run(), whole)


def in_older_format(folder, change=lambda kept: None):
    """As the version before wrote it: no checksum, few settings."""
    for name in STATES[1:]:
        (folder / name).unlink()
    kept = torch.load(folder / "state.pt", weights_only=True)
    kept = {name: kept[name] for name in ("module", "progress", "start")}
    for name in ("files", "initial_weights", "allowed"):
        del kept["progress"][name]
    change(kept)
    torch.save(kept, folder / "state.pt")
    settings = read_json(folder / "settings.json")
    settings["tasks"] = {name: task["outputs"] for name, task in settings["tasks"].items()}
    old = ("method", "isolation", "epochs", "invariance_epochs", "seed", "score_on", "tasks", "processes")
    (folder / "settings.json").write_text(json.dumps({name: settings[name] for name in old}))


def test_a_folder_of_the_version_before_is_taken_with_a_word(folders, tmp_path):
    root, whole = folders
    shutil.copytree(root / "half", tmp_path / "half")
    in_older_format(tmp_path / "half")
    with pytest.raises(ContinualError, match="seed=0, not 3"):
        run_of(tmp_path / "half", seed=3).run()
    with pytest.raises(ContinualError, match=r"order=\['a', 'b'\], not \['b', 'a'\]"):
        run_of(tmp_path / "half", sequence=pair()[::-1]).run()
    with told("written by an older version", "not known"):
        assert same(run_of(tmp_path / "half").run(), whole)
    run_of(tmp_path / "half").run()  # by now it is of this version


@pytest.mark.parametrize(
    ("change", "words"), [(nan, "'body.0.weight' is not finite"), (wiped, "other owners of 'body.0' than task 'a'")]
)
def test_a_folder_of_the_version_before_is_looked_at(folders, tmp_path, change, words):
    root, _ = folders
    shutil.copytree(root / "half", tmp_path / "half")
    in_older_format(tmp_path / "half", change)
    with pytest.raises(ContinualError, match=words):
        run_of(tmp_path / "half").run()


def test_a_state_of_a_newer_version_is_refused_by_name(folders, tmp_path):
    root, _ = folders
    shutil.copytree(root / "half", tmp_path / "half")
    kept = torch.load(tmp_path / "half/state.pt", weights_only=True)
    torch.save({**kept, "format": 3}, tmp_path / "half/state.pt")
    with pytest.raises(ContinualError, match=r"state\.pt has format 3; this lightning_cf reads up to 2"):
        run_of(tmp_path / "half").run()


def test_pictures_are_left_out_of_a_record_that_is_damaged(folders, tmp_path):
    root, _ = folders
    shutil.copytree(root / "finished/tasks", tmp_path / "tasks")
    (tmp_path / "tasks/00-a/partition-0/0_body.0/owner.npy").unlink()
    with told("owner.npy is missing or damaged", "pictures are left out"):
        write_unit_pictures(tmp_path / "tasks")
    assert not (tmp_path / "tasks/00-a/units.png").exists()
    assert (tmp_path / "tasks/01-b/units.png").exists()


def test_a_record_of_the_current_task_that_is_damaged_stops_nothing(tmp_path):
    class Harm(Callback):
        def on_train_start(self, trainer, pl_module):
            for path in tmp_path.glob("run/tasks/00-a/partition-0/*/owner.npy"):
                path.write_bytes(b"")

    with told("owner.npy is missing or damaged", "goes on without it"):
        run_of(tmp_path / "run", callbacks=[Harm()], sequence=pair()[:1]).run()


def test_what_a_kill_left_half_written_is_removed(tmp_path):
    (tmp_path / "state.pt.0.partial").write_bytes(b"x" * 100)
    run_of(tmp_path, sequence=pair()[:1]).run()
    assert not list(tmp_path.rglob("*.partial"))
    assert not (tmp_path / "run.lock").exists()


def test_documents_are_known_by_their_checksum(tmp_path):
    path = tmp_path / "job.json"
    write_json(path, {"status": 0, "overrides": ["a=1"]})
    assert read_json(path) == {"status": 0, "overrides": ["a=1"]}
    path.write_text(path.read_text().replace('"status": 0', '"status": 1'))
    with pytest.raises(ContinualError, match=r"job\.json is damaged"):
        read_json(path)


@pytest.mark.parametrize("name", ["../outside.npy", "/etc/outside.npy", "partition-0/../../outside.npy", "", "x.npy"])
@pytest.mark.parametrize("checked", [True, False])
def test_a_record_names_its_own_files_only(folders, tmp_path, name, checked):
    from lightning_cf.records.record import complete_record
    from lightning_cf.utilities.files import with_checksum

    root, _ = folders
    shutil.copytree(root / "finished/tasks/00-a", tmp_path / "record")
    shutil.copy(tmp_path / "record/partition-0/0_body.0/direction.npy", tmp_path / "outside.npy")
    before = (tmp_path / "outside.npy").read_bytes()
    manifest = read_json(tmp_path / "record/partition.json")
    manifest["layers"][0]["arrays"]["direction"]["file"] = name
    (tmp_path / "record/partition.json").write_text(json.dumps(with_checksum(manifest) if checked else manifest))
    with pytest.raises(ContinualError, match="none of its own files"):
        PartitionRecord.load(tmp_path / "record")
    with pytest.raises(ContinualError, match="none of its own files"):
        complete_record(tmp_path / "record", {"body.0": (torch.ones(8, 6), torch.ones(8))})
    assert (tmp_path / "outside.npy").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"record", "outside.npy"}


def test_a_store_without_a_state_has_nothing_to_go_on_from(tmp_path):
    assert RunStore(tmp_path / "run").find({"seed": 0}) is None
