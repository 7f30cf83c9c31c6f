"""``python -m lightning_cf`` is ``lightning-cf``."""

import sys

from lightning_cf import __version__
from lightning_cf.cli.stopping import ended_by_signals


def main() -> None:
    """The command line, which ends as it should from the first moment on: loading torch takes seconds."""
    if "--version" in sys.argv[1:]:  # Hydra would tell its own
        print(f"lightning-cf {__version__}")
        return
    with ended_by_signals():
        from lightning_cf.cli.main import main as command

        command()


if __name__ == "__main__":
    main()
