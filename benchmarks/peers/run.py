"""Runs peers in their library's environment: ``python run.py LIBRARY JOBS``, jobs in JSON with their results' files."""

import json
import sys
import warnings
from importlib import import_module
from pathlib import Path

from operators import declare_operators

PACKAGES = {"avalanche": "avalanche-lib", "clarena": "clarena"}


def main() -> None:
    warnings.simplefilter("ignore")
    declare_operators()
    from protocol import Job, run

    library, jobs = sys.argv[1], json.loads(sys.argv[2])
    make = import_module(f"with_{library}").make
    for entry in jobs:
        job, result = entry["job"], Path(entry["result"])
        found = run(Job(**job), make, PACKAGES[library])
        del job["data_dir"]
        result.write_text(json.dumps({"job": job, **found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
