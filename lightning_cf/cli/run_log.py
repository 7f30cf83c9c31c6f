"""Where the command line's warnings go: above the bar, and into a file of the run."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_only

from lightning_cf.cli.progress_bar import RunBar
from lightning_cf.errors import ContinualWarning, printable
from lightning_cf.lightning_api import PossibleUserWarning

LOG = "warnings.log"


@contextmanager
def logged_warnings(folder: Path, bar: RunBar) -> Iterator[None]:
    """Meanwhile warnings go to the terminal and into ``warnings.log``, each once; the first process tells.

    Lightning's own advice about loaders and loops stays silent. Ours is always heard, whichever module Python takes it
    to come from: hooks are called by Lightning's.

    Args:
        folder: of the run.
        bar: printed above; its title says which method is running.
    """
    shown: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if getattr(rank_zero_only, "rank", 0) != 0:
            return
        text = printable(" ".join(str(message).split()))
        if text not in shown:
            shown.add(text)
            RunBar.write(f"lightning-cf: warning: {text}")
        _keep(folder / LOG, f"{bar.title}: {category.__name__}: {text}")

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=PossibleUserWarning)
        warnings.filterwarnings("ignore", module=r"(lightning|pytorch_lightning|lightning_fabric)\.")
        warnings.simplefilter("always", ContinualWarning)
        warnings.showwarning = show
        yield


def _keep(path: Path, line: str) -> None:
    """Adds a line to a file unless it has it: a run that is taken up again warns of the same things."""
    known = path.read_text().splitlines() if path.exists() else []
    if line not in known:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(f"{line}\n")
