"""`python -m bench_dcp.child TASK ARGUMENTS`: runs one task and prints its figures as JSON on the last line."""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
import warnings


def main(task: str, arguments: str) -> None:
    """Imports the task's module and calls its `run`."""
    warnings.simplefilter("ignore")
    # As in a program that keeps warnings to itself; what libraries log costs them what it costs everybody.
    logging.getLogger().addHandler(logging.NullHandler())
    figures = importlib.import_module(f"bench_dcp.tasks.{task}").run(**json.loads(arguments))
    print(json.dumps(figures), flush=True)
    # Libraries' own threads may abort a process that takes itself down around them; the figures are out.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
