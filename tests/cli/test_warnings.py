"""What we warn of is heard: on the terminal, in a file of the run and in its result, each once."""

import ast
import json
import warnings
from pathlib import Path

import pytest
import torch
from commands import here
from learning import classifier, quiet_trainer, tasks
from torch import nn

import lightning_cf
from lightning_cf import MaskedGradientCallback, SequentialTaskRunner, StructureWarning
from lightning_cf.cli.progress_bar import RunBar
from lightning_cf.cli.run_log import logged_warnings
from lightning_cf.errors import ContinualWarning, FrozenWarning
from lightning_cf.partition.cost import PartitionWarning
from lightning_cf.utilities.noting import noting

SMALL = ["epochs=1", "invariance_epochs=1", "tasks.order=[0,1]", "task_inference=none"]


class United(nn.Sequential):
    """A network of which one layer's units share one fate."""

    def __init__(self, **options):
        super().__init__(nn.Flatten(), nn.Linear(64, 20), nn.Softmax(dim=1), nn.Linear(20, 20), nn.ReLU())
        self.append(nn.Linear(20, 10))


UNITED = ["model.network._target_=test_warnings.United"]
SENTENCE = "Of 'network.1' one unit is left, which the first task owns whole."


@pytest.mark.usefixtures("unchecked")
def test_a_warning_reaches_terminal_file_and_result_once_for_each_method(tmp_path, monkeypatch, capsys):
    line = [f"run={tmp_path}", *SMALL, *UNITED, "partition.threshold=0.99"]
    status, _, errors = here(monkeypatch, capsys, *line)
    assert status == 0, errors
    result = json.loads((tmp_path / "result.json").read_text())
    assert errors.count(SENTENCE) == 1
    assert sum(SENTENCE in text for text in result["warnings"]) == 1
    assert len(set(result["warnings"])) == len(result["warnings"])
    assert all(f"lightning-cf: warning: {' '.join(text.split())}" in errors for text in result["warnings"])
    kept = (tmp_path / "warnings.log").read_text().splitlines()
    assert sum(SENTENCE in text and text.startswith("exact: StructureWarning: ") for text in kept) == 1
    assert {len(other["warnings"]) > 0 for name, other in result["compare"].items() if name == "perturb"} == {
        any(text.startswith("perturb: ") for text in kept)
    }
    again, _, errors = here(monkeypatch, capsys, *line)
    assert again == 0, errors
    assert json.loads((tmp_path / "result.json").read_text())["warnings"] == result["warnings"]
    assert (tmp_path / "warnings.log").read_text().splitlines() == kept


@pytest.mark.usefixtures("unchecked")
@pytest.mark.filterwarnings("ignore:.*no claim within the budget")
def test_a_run_that_is_taken_up_keeps_what_was_warned_of_before(tmp_path, monkeypatch):
    from small_project import X, net, over, quiet

    def runner():
        torch.manual_seed(0)
        return SequentialTaskRunner(net(), [over(X)], trainer=quiet, epochs=1, invariance_epochs=1, root=tmp_path)

    original = SequentialTaskRunner.partition

    def warned(self, task):
        for _ in range(3):
            warnings.warn("the claim is odd", PartitionWarning, stacklevel=2)
        original(self, task)

    monkeypatch.setattr(SequentialTaskRunner, "partition", warned)
    monkeypatch.setattr(SequentialTaskRunner, "invariance", lambda self, task: 1 / 0)
    with pytest.warns(PartitionWarning, match="the claim is odd") as heard, pytest.raises(ZeroDivisionError):
        runner().run()
    assert sum("the claim is odd" in str(found.message) for found in heard) == 1
    monkeypatch.undo()
    assert [text for text in runner().run().warnings if "no claim" not in text] == ["the claim is odd"]


@pytest.mark.parametrize("category", [ContinualWarning, StructureWarning, FrozenWarning, PartitionWarning])
@pytest.mark.filterwarnings("default")
def test_none_of_ours_is_silenced_with_lightnings(category, tmp_path, capsys):
    bar = RunBar()
    bar.title = "exact"
    with logged_warnings(tmp_path, bar):
        for place in ("lightning/pytorch/trainer/call.py", "lightning_cf/callbacks/partition.py"):
            module = place.removesuffix(".py").replace("/", ".")
            warnings.warn_explicit("odd\x1b[31m", category, place, 3, module=module)
            warnings.warn_explicit("advice", UserWarning, place, 3, module=module)
        warnings.warn_explicit("theirs", UserWarning, "mine.py", 3, module="mine")
    told = ["odd\\x1b[31m", "advice", "theirs"]  # advice of the second place, which is not Lightning's
    assert capsys.readouterr().err.splitlines() == [f"lightning-cf: warning: {text}" for text in told]
    kept = [f"exact: {category.__name__}: odd\\x1b[31m", "exact: UserWarning: advice", "exact: UserWarning: theirs"]
    assert (tmp_path / "warnings.log").read_text().splitlines() == kept


def test_every_warning_of_the_package_is_one_of_ours():
    for path in Path(lightning_cf.__path__[0]).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert called != "warnings.warn", f"{path}: {ast.unparse(node)} speaks of our own line, or of Lightning's"
            if called == "warn":
                category = ast.unparse(node.args[1]) if len(node.args) > 1 else "none"
                assert category.endswith("Warning") and category != "UserWarning", f"{path}: {ast.unparse(node)}"
    assert all(issubclass(kind, ContinualWarning) for kind in (StructureWarning, FrozenWarning, PartitionWarning))


def test_a_warning_speaks_of_the_users_line_and_filters_of_lightnings_own_leave_it(tmp_path):
    module, (task, *_) = classifier(), tasks()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", module=r"lightning\.")
        warnings.filterwarnings("ignore", module="lightning_cf")
        for each in (task, tasks()[1]):
            quiet_trainer(max_epochs=1, limit_train_batches=1, callbacks=[MaskedGradientCallback()]).fit(
                module, datamodule=each
            )
    (ours,) = [w for w in heard if issubclass(w.category, ContinualWarning)]
    assert "was never partitioned" in str(ours.message)
    assert ours.filename == __file__


def test_noting_leaves_other_warnings_and_the_users_filters_alone():
    notes = ["known"]
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        with noting(notes):
            warnings.warn("theirs", UserWarning, stacklevel=1)
            warnings.warn("known", ContinualWarning, stacklevel=1)
            warnings.warn("new", ContinualWarning, stacklevel=1)
    assert [str(found.message) for found in heard] == ["theirs", "new"]
    with pytest.raises(ContinualWarning, match="an error to the user"), noting(notes):
        warnings.warn("an error to the user", ContinualWarning, stacklevel=1)
    assert notes == ["known", "new", "an error to the user"]
