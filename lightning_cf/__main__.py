"""``python -m lightning_cf`` is ``lightning-cf``."""

from lightning_cf.cli import main

if __name__ == "__main__":
    main()
