"""How the command tells an error: what a user got wrong in one line, what nobody foresaw with its type and a hint."""

from __future__ import annotations

import re
import sys
from typing import NoReturn

from hydra.errors import HydraException, InstantiationException
from omegaconf.errors import OmegaConfBaseException

from lightning_cf.cli.stopping import check_stopped
from lightning_cf.errors import ContinualError, printable
from lightning_cf.lightning_api import MisconfigurationException


def fail(error: Exception, *, foreseen: bool = False) -> NoReturn:
    """Prints what went wrong, in one line, and ends the process with status 1.

    Args:
        error: what was raised.
        foreseen: whether its text is for users as it stands, though it is none of the package's own errors.
    """
    check_stopped()  # what else went wrong on the way out
    text = printable(" ".join(told(error, foreseen).split())).removeprefix("lightning-cf: ")
    print(f"lightning-cf: error: {text}", file=sys.stderr)
    sys.exit(1)


def told(error: BaseException, foreseen: bool) -> str:
    """What a user got wrong as it stands; with its type, and a hint, what nobody foresaw."""
    cause = error.__cause__
    found = error
    while isinstance(found, (HydraException, OmegaConfBaseException)) and found.__cause__ is not None:
        found = found.__cause__
    if isinstance(found, ContinualError):
        return str(found).partition(" raised while resolving interpolation: ")[2] or str(found)
    if isinstance(error, InstantiationException) and cause is not None:
        target, key = (re.search(p, str(error)) for p in (r"target '([^']*)'", r"full_key: (\S+)"))
        return f"{key[1] if key else 'the configuration'}: {target[1] if target else 'it'} cannot be made: {cause}"
    text = str(error).partition("\nConfig search path")[0].partition("\nSee https://")[0]
    if isinstance(error, HydraException) and isinstance(cause, OmegaConfBaseException):
        text += f" {cause}"
    text = text.replace("\n    full_key:", " Key:").partition("\n    object_type=")[0]
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename} cannot be used: {error.strerror}. Choose another folder with run=FOLDER."
    if text and (foreseen or isinstance(error, (HydraException, OmegaConfBaseException, MisconfigurationException))):
        return text
    return f"{type(error).__name__}: {text} (HYDRA_FULL_ERROR=1 shows where.)"
