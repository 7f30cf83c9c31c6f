"""What is built from the project holds what its users need."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import lightning_cf

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel and the source distribution."""
    folder = tmp_path_factory.mktemp("dist")
    line = [sys.executable, "-m", "hatchling", "build", "--directory", str(folder)]
    subprocess.run(line, cwd=ROOT, check=True, capture_output=True)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


def test_the_wheel_has_types_options_licence_and_links_that_lead_somewhere(built):
    with zipfile.ZipFile(built[0]) as wheel:
        names = wheel.namelist()
        info = next(name.partition("/")[0] for name in names if ".dist-info/" in name)
        metadata = message_from_bytes(wheel.read(f"{info}/METADATA"))
    assert {"lightning_cf/py.typed", "lightning_cf/conf/config.yaml", f"{info}/licenses/LICENSE"} <= {*names}
    assert {name.partition("/")[0] for name in names} == {"lightning_cf", info}
    assert metadata["Version"] == lightning_cf.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    text = metadata.get_payload()
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) > 5
    assert all(link.startswith(("https://", "#")) for link in links), links
    assert len(re.findall(r"!\[[^]]*\]\(https://[^)]*/raw/[^)]*\.png\)", text)) == 2


def test_the_source_distribution_has_all_that_the_repository_has(built):
    with tarfile.open(built[1]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode or not (ROOT / ".git").exists():
        pytest.skip("no repository to compare with: these tests run from a source distribution themselves")
    tracked = {name for name in done.stdout.splitlines() if not name.startswith(".git") and (ROOT / name).exists()}
    assert tracked - names == set()
    assert names - tracked <= {"PKG-INFO", ".gitignore", *untracked()}


def untracked():
    """What is not committed yet."""
    line = ["git", "ls-files", "--others", "--exclude-standard"]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.slow
def test_tests_run_from_the_source_distribution(built, tmp_path):
    with tarfile.open(built[1]) as sdist:
        sdist.extractall(tmp_path, filter="data")
    (root,) = tmp_path.iterdir()
    names = ("test_configs", "test_doctor", "test_ledger")
    some = [path for name in names for path in root.rglob(f"tests/**/{name}.py")]
    assert len(some) == 3
    line = [sys.executable, "-m", "pytest", "--numprocesses", "0", *map(str, some)]
    done = subprocess.run(
        line, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "[100%]" in done.stdout
