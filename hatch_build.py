"""What the build adds to the metadata of pyproject.toml."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

BRANCH = "main"


class ReadmeHook(MetadataHookInterface):
    """The README for an index page, where a path within the repository leads nowhere: it becomes an address."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Sets the readme."""
        source = metadata["urls"]["Source"]

        def absolute(link: re.Match[str]) -> str:
            view = "raw" if link["picture"] else "blob"
            return f"{link['picture']}[{link['text']}]({source}/{view}/{BRANCH}/{link['path']})"

        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        text = re.sub(r"(?P<picture>!?)\[(?P<text>[^]]*)\]\((?!https?:|#)(?P<path>[^)]+)\)", absolute, text)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
