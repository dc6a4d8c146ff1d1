"""The `ckpt-cloud` command; each subcommand is loaded when it is called, so that `ls` does not pay for torch."""

from __future__ import annotations

from ckpt_cloud.cli.app import main

__all__ = ["main"]
