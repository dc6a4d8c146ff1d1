"""`ckpt-cloud ls`."""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec
from rich.console import Console
from rich.table import Table

from ckpt_cloud.catalog import CheckpointInfo, list_checkpoints


def run(root: str, *, as_json: bool) -> None:
    """Prints the checkpoints under `root`, oldest first."""
    found = list_checkpoints(root)
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(found)).decode())
        return
    table = Table("name", "state", "saved (UTC)", box=None)
    for info in found:
        table.add_row(info.name, info.state, _time(info))
    Console().print(table)


def _time(info: CheckpointInfo) -> str:
    return datetime.fromtimestamp(info.saved_unix_s, UTC).strftime("%Y-%m-%d %H:%M:%S") if info.attempt else ""
