"""The examples, before and after: a few lines differ, and what they do."""

import difflib
import logging
import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = {"image": 0.9, "segmentation": 0.75, "sequence": 0.9}
"""With how well each of the two tasks is to be learned."""

PLAIN = ("plain_loop", "dict_batches", "fabric")

pytestmark = pytest.mark.filterwarnings("ignore")


def run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    scores = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]()
    assert not list(tmp_path.iterdir())
    return scores


def test_every_example_has_a_before_and_an_after():
    pairs = {f"{n}_{when}" for n in NAMES for when in ("before", "after")}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*pairs, *PLAIN}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", [*PLAIN[::2], pytest.param(PLAIN[1], marks=pytest.mark.slow)])
def test_in_loops_without_lightnings_trainer_the_first_task_stays_bitwise_what_it_was(name, monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]()
    *scores, last = capsys.readouterr().out.splitlines()
    assert last == "outputs of the first task bitwise the same: True"
    assert all(float(re.search(r": (\d\.\d+);", line)[1]) > 0.9 for line in scores)


@pytest.mark.parametrize("name", NAMES)
def test_ten_lines_differ_at_most(name):
    before, after = ((EXAMPLES / f"{name}_{when}.py").read_text().splitlines() for when in ("before", "after"))
    changed = [line for line in difflib.ndiff(before, after) if line[0] in "+-"]
    assert 0 < len(changed) <= 10, changed


@pytest.mark.parametrize(
    "name", ["image", *(pytest.param(name, marks=pytest.mark.slow) for name in ("segmentation", "sequence"))]
)
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
