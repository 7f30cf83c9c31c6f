"""What the README and the notebooks show runs as it stands."""

import inspect
import pydoc
import re
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient

import lightning_cf
from lightning_cf.options import PartitionKeywords
from lightning_cf.task_inference import STRATEGIES, View

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.filterwarnings("ignore")
def test_the_readmes_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 2
    names = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["result"].accuracy.forgetting == 0.0
    assert names["forgotten"] == 0


def test_the_strategy_that_the_docs_write_is_taken(monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "task-inference.md").read_text(), flags=re.DOTALL)
    (block,) = [block for block in blocks if "class Margin" in block]
    monkeypatch.setitem(STRATEGIES, "margin", STRATEGIES["energy"])  # taken out again when the test ends
    names = {"TaskInferenceCallback": lightning_cf.TaskInferenceCallback}
    exec(compile(block, "task-inference.md", "exec"), names)
    assert names["callback"].strategy == "margin"
    view = View(None, (), torch.tensor([[3.0, 1.0], [0.0, 0.0]]))
    fitted = STRATEGIES["margin"].fit(view, torch.tensor([0, 1]), 2, view)
    assert STRATEGIES["margin"].score(fitted, view).tolist() == pytest.approx([2 / float(view.logits.std()), 0.0])


def test_the_readmes_make_commands_and_options_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"^make ([a-z]+)", README, flags=re.MULTILINE)) <= targets
    commands = "\n".join(re.findall(r"^lightning-cf .*$", README, flags=re.MULTILINE))
    for group, choice in re.findall(r"\b(tasks|model|partition|invariance|trainer)=([a-z_]+)\b", commands):
        assert (ROOT / "conf" / group / f"{choice}.yaml").exists(), (group, choice)


def test_the_readmes_pictures_exist():
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert pictures
    assert all((ROOT / picture).exists() for picture in pictures)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_run(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert any(cell.cell_type == "code" and cell.outputs for cell in notebook.cells)


def test_the_patents_table_names_tests_and_code_that_exist():
    table = (ROOT / "docs" / "patent.md").read_text()
    tests = re.findall(r"`(tests/\w+\.py)::(\w+)`", table)
    assert len(tests) > 30
    for path, name in tests:
        assert re.search(rf"^def {name}\(", (ROOT / path).read_text(), flags=re.MULTILINE), f"{path}::{name}"
    names = re.findall(r"`(lightning_cf\.[\w.]+)`", table)
    assert len(names) > 10
    for name in names:
        assert pydoc.locate(name) is not None, name
    for owner, option in re.findall(r"`(\w+)\((\w+)=", table):
        target = getattr(lightning_cf, owner)
        known = {*inspect.signature(target).parameters, *PartitionKeywords.__annotations__}
        assert option in known, f"{owner}({option}=)"
    rows = re.findall(r"^\| (P\d+) \|.*\| (.*) \|$", table, flags=re.MULTILINE)
    assert [name for name, _ in rows] == [f"P{i}" for i in range(1, 30)]
    built = {f"P{i}" for i in (*range(1, 19), 20, 21, 23, 26)}
    assert all(shown.strip() for name, shown in rows if name in built)
