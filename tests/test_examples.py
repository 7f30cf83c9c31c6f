"""The examples, before and after: a few lines differ, and what they do."""

import difflib
import logging
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
NAMES = {"image": 0.9, "segmentation": 0.75, "sequence": 0.9}
"""With how well each of the two tasks is to be learned."""

pytestmark = pytest.mark.filterwarnings("ignore")


def run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    scores = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]()
    assert not list(tmp_path.iterdir())
    return scores


def test_every_example_has_a_before_and_an_after():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {
        f"{n}_{when}" for n in NAMES for when in ("before", "after")
    }


@pytest.mark.parametrize("name", NAMES)
def test_ten_lines_differ_at_most(name):
    before, after = ((EXAMPLES / f"{name}_{when}.py").read_text().splitlines() for when in ("before", "after"))
    changed = [line for line in difflib.ndiff(before, after) if line[0] in "+-"]
    assert 0 < len(changed) <= 10, changed


@pytest.mark.parametrize("name", ["image", "segmentation", pytest.param("sequence", marks=pytest.mark.slow)])
def test_afterwards_both_tasks_are_learned_and_nothing_is_forgotten(name, tmp_path, monkeypatch):
    first, second = run(f"{name}_after", tmp_path, monkeypatch)
    begun, later = first.keys()
    assert second[begun] == first[begun] >= NAMES[name]
    assert second[later] >= NAMES[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_before_the_first_task_is_forgotten(name, tmp_path, monkeypatch):
    first, second = run(f"{name}_before", tmp_path, monkeypatch)
    begun, later = first.keys()
    assert min(first[begun], second[later]) >= NAMES[name]
    assert second[begun] < first[begun] - 0.05
