"""The package's types, as those see them who check their own scripts strictly: with mypy, and with pyright."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_cf

HERE = Path(__file__).parent
PACKAGE = Path(str(lightning_cf.__file__)).parent.parent


def checked(folder, *line):
    """What a checker prints, run in a folder away from the project, whose settings are not a user's."""
    places = os.pathsep.join([str(PACKAGE), *filter(None, [os.environ.get("PYTHONPATH")])])
    line = [sys.executable, "-m", *line]
    done = subprocess.run(
        line, cwd=folder, env={**os.environ, "PYTHONPATH": places}, capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 1), done.stderr
    return done.stdout


def mypy(folder):
    found = checked(folder, "mypy", "--strict", "--no-color-output", "user_script.py", "planted_errors.py")
    return re.findall(r"^(\w+\.py):(\d+): error:", found, flags=re.MULTILINE)


def pyright(folder):
    settings = {"typeCheckingMode": "strict", "pythonVersion": f"3.{sys.version_info.minor}", "include": ["*.py"]}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    found = json.loads(checked(folder, "basedpyright", "--outputjson", "--pythonpath", sys.executable))
    assert found["summary"]["filesAnalyzed"] == 2
    return [
        (Path(each["file"]).name, str(each["range"]["start"]["line"] + 1))
        for each in found["generalDiagnostics"]
        if each["severity"] != "information"
    ]


def test_the_user_script_is_short():
    assert len((HERE / "user_script.py").read_text().splitlines()) <= 40


@pytest.mark.slow
@pytest.mark.parametrize("checker", [mypy, pyright])
def test_a_strict_user_script_passes_and_each_planted_error_is_found(checker, tmp_path):
    for name in ("user_script.py", "planted_errors.py"):
        shutil.copy(HERE / name, tmp_path)
    lines = (HERE / "planted_errors.py").read_text().splitlines()
    planted = [("planted_errors.py", str(number)) for number, line in enumerate(lines, 1) if "# planted" in line]
    assert len(planted) == 3
    assert sorted(checker(tmp_path)) == sorted(planted)
