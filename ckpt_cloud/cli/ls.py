"""`ckpt-cloud ls`."""

from __future__ import annotations

import typer
from rich.table import Column, Table

from ckpt_cloud import bridge
from ckpt_cloud.catalog import CheckpointInfo, describe, list_checkpoints
from ckpt_cloud.cli.ending import NOTHING
from ckpt_cloud.cli.nearby import near
from ckpt_cloud.cli.output import console, note, print_json, utc
from ckpt_cloud.options import StoreOptions
from ckpt_cloud.stores import open_store, parse_url


def run(root: str, *, all_: bool, as_json: bool) -> None:
    """Prints the checkpoints under `root`, oldest first; for people without those that are gone, unless `all_`."""
    found = list_checkpoints(root)
    shown = [info for info in found if all_ or info.state not in ("deleted", "aborted")]
    if as_json:
        print_json(found)
    elif shown:
        table = Table(Column("name", overflow="fold"), "state", "saved (UTC)", "metrics", box=None)
        for info in shown:
            table.add_row(info.name, info.state, utc(info.saved_unix_s), _metrics(info))
        console.print(table)
    if len(shown) < len(found) and not as_json:
        note(f"{len(found) - len(shown)} deleted or aborted; --all shows them")
    if not (found if as_json else shown):
        note(_nothing(root))
        raise typer.Exit(NOTHING)


def _nothing(root: str) -> str:
    location = parse_url(root)
    if bridge.run(describe(open_store(location, StoreOptions()), location)).state == "committed":
        return f"{root} is a checkpoint itself: ckpt-cloud show {root}"
    likely = near(location)
    return f"no checkpoints under {root}" + (f"; did you mean {' or '.join(likely)}?" if likely else "")


def _metrics(info: CheckpointInfo) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in info.metrics.items())
