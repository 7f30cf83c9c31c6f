"""Importing the package loads nothing heavy that Lightning does not load itself."""

import subprocess
import sys

from lightning_cf import __version__

HEAVY = ("hydra", "joblib", "matplotlib", "omegaconf", "scipy", "sklearn", "torchvision", "tqdm")
"""What single functions need, and load when they are called."""

PROBE = f"""
import sys

import lightning.pytorch

# Lightning loads some of these through torchmetrics; forgotten here, those that our own modules ask for come back.
for name in [name for name in sys.modules if name.partition(".")[0] in {HEAVY}]:
    del sys.modules[name]

import lightning_cf

for name in lightning_cf.__all__:
    getattr(lightning_cf, name)
import lightning_cf.data
import lightning_cf.models

print(*sorted({{name.partition(".")[0] for name in sys.modules}} & {{*{HEAVY}}}))
"""


def test_public_names_load_no_heavy_library():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", PROBE], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_version_is_known_before_torch_is_loaded():
    code = "import sys, lightning_cf; print(lightning_cf.__version__, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [__version__, "False"]
