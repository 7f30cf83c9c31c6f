"""``python -m lightning_cf`` is ``lightning-cf``."""

from lightning_cf.cli.stopping import ended_by_signals


def main() -> None:
    """The command line, which ends as it should from the first moment on: loading torch takes seconds."""
    with ended_by_signals():
        from lightning_cf.cli.main import main as command

        command()


if __name__ == "__main__":
    main()
