"""The `ckpt-cloud` command; each subcommand is loaded when it is called, so that `ls` does not pay for torch."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point; an interrupt before a command begins ends without a traceback, too."""
    try:
        from ckpt_cloud.cli.app import main as run

        run()
    except KeyboardInterrupt:
        print("interrupted: nothing was changed", file=sys.stderr)
        sys.exit(130)


__all__ = ["main"]
