"""Prints the oldest version of each requirement that pyproject.toml allows, as pins for ``make floors``."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
ANY = {
    "basedpyright",  # checkers are of one version for all, that of the lock
    "mypy",
    "ruff",
}

project = tomllib.loads((ROOT / "pyproject.toml").read_text())
found = [*project["project"]["dependencies"], *project["project"]["optional-dependencies"]["test"]]
floors = dict(re.fullmatch(r"([\w.\[\]-]+)>=([\w.]+)(?:,.*)?", line).groups() for line in found)
# Torch stays as it is locked: an older one is gigabytes to download, and most machines have it once.
floors["torch"] = re.search(r"^torch==(\S+)", (ROOT / "requirements.lock").read_text(), flags=re.MULTILINE)[1]
for name in sorted(floors.keys() - ANY):
    print(f"{name}=={floors[name]}")
