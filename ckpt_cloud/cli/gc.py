"""`ckpt-cloud gc`."""

from __future__ import annotations

import sys
from datetime import timedelta

import msgspec
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from ckpt_cloud.collector import gc

_SHOWN = 50


def run(root: str, *, older_than_hours: float, delete: bool, as_json: bool) -> None:
    """Prints what no checkpoint under `root` needs, and deletes it if asked to."""
    collected = gc(root, older_than=timedelta(hours=older_than_hours), dry_run=not delete)
    for url, reason in collected.skipped:
        print(f"skipped {url}: {reason}", file=sys.stderr)
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(collected)).decode())
        return
    table = Table("object", "size", box=None)
    for garbage in collected.objects[:_SHOWN]:
        table.add_row(garbage.key, decimal(garbage.size_bytes))
    if len(collected.objects) > _SHOWN:
        table.add_row(f"... and {len(collected.objects) - _SHOWN} more", "")
    console = Console()
    console.print(table)
    said = "Deleted" if delete else "--delete would delete"
    found = f"{len(collected.objects)} object(s), {decimal(collected.size_bytes)}"
    console.print(f"{said} {found}, and {len(collected.uploads)} unfinished upload(s).", highlight=False)
