"""`ckpt-cloud ls`."""

from __future__ import annotations

import typer
from rich.table import Table

from ckpt_cloud.catalog import CheckpointInfo, list_checkpoints
from ckpt_cloud.cli.ending import NOTHING
from ckpt_cloud.cli.nearby import near
from ckpt_cloud.cli.output import console, note, print_json, utc
from ckpt_cloud.stores import parse_url


def run(root: str, *, as_json: bool) -> None:
    """Prints the checkpoints under `root`, oldest first."""
    found = list_checkpoints(root)
    if as_json:
        print_json(found)
    elif found:
        table = Table("name", "state", "saved (UTC)", "metrics", box=None)
        for info in found:
            table.add_row(info.name, info.state, utc(info.saved_unix_s), _metrics(info))
        console.print(table)
    if not found:
        likely = near(parse_url(root))
        note(f"no checkpoints under {root}" + (f"; did you mean {' or '.join(likely)}?" if likely else ""))
        raise typer.Exit(NOTHING)


def _metrics(info: CheckpointInfo) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in info.metrics.items())
