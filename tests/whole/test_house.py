"""The house keeps its shape: sizes of files and functions, docstrings, and tests that lie where what they test lies.

Which package may import which is checked by ``make test`` before the tests (``[tool.importlinter]``).
"""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "lightning_cf"
FILES = sorted(PACKAGE.rglob("*.py"))
LONG_FILE, LONG_FUNCTION, SHORT_DOCSTRING = 300, 40, 4

REASONS: dict[str, str] = {}
"""Functions that may be longer, and why."""

ACROSS = {"whole", "typing"}
"""Folders of tests that are of no one package."""


def functions(node, name=""):
    """Every function and method with its dotted name."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            inner = f"{name}.{child.name}" if name else child.name
            if not isinstance(child, ast.ClassDef):
                yield inner, child
            yield from functions(child, inner)


def lines_of(function):
    """Its lines without signature and docstring."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def trees():
    for path in FILES:
        yield path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."), ast.parse(path.read_text())


def test_no_file_is_too_long_to_be_one_idea():
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in FILES}
    assert {name: count for name, count in long.items() if count > LONG_FILE} == {}


def test_no_function_is_too_long_to_be_read_at_once():
    long = {f"{m}.{name}": lines_of(f) for m, tree in trees() for name, f in functions(tree)}
    assert {name: count for name, count in long.items() if count > LONG_FUNCTION and name not in REASONS} == {}
    assert REASONS.keys() <= long.keys()


def test_docstrings_tell_more_than_a_name():
    short = {}
    for module, tree in trees():
        for name, function in functions(tree):
            said = (ast.get_docstring(function) or "").split()
            if 0 < len(said) <= SHORT_DOCSTRING:
                short[f"{module}.{name}"] = " ".join(said)
    assert short == {}


def test_every_package_says_what_it_is_and_where_to_begin():
    for path in PACKAGE.rglob("__init__.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_tests_lie_where_what_they_test_lies():
    packages = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    folders = {path.parent.name for path in (ROOT / "tests").rglob("test_*.py")}
    assert folders - ACROSS <= packages
    assert not list((ROOT / "tests").glob("test_*.py"))


def test_the_core_is_loaded_without_lightning():
    modules = ["functional", "exactness", "task_inference", "records", "network.tracing"]
    code = f"""
import importlib, sys
for module in {modules}:
    importlib.import_module("lightning_cf." + module)
    found = {{name.split(".")[0] for name in sys.modules}}
    assert not found & {{"lightning", "pytorch_lightning", "lightning_fabric"}}, module
"""
    subprocess.run([sys.executable, "-c", code], check=True)
