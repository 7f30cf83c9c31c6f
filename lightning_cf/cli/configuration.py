"""Where the configuration lies, and which of its options are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

_PACKAGE = Path(__file__).parent.parent
_PACKAGED = _PACKAGE / "conf"
FOLDER = _PACKAGED if _PACKAGED.is_dir() else _PACKAGE.parent / "conf"


def unread(config: DictConfig) -> list[str]:
    """Names of options at the top, such as ``+NAME=VALUE`` adds, that a run does not read and no other refers to."""
    known: Any = OmegaConf.to_container(OmegaConf.load(FOLDER / "config.yaml"))
    groups = [name for default in known["defaults"] if isinstance(default, dict) for name in default]
    text = OmegaConf.to_yaml(config)
    return [name for name in map(str, config) if name not in (*known, *groups) and f"${{{name}" not in text]
