"""`ckpt-cloud uploads`."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import msgspec
from rich.console import Console
from rich.table import Table

from ckpt_cloud.uploads import abort_uploads, list_uploads


def run(root: str, *, older_than_hours: float, abort: bool, as_json: bool) -> None:
    """Prints the unfinished uploads under `root`, oldest first, and aborts them if asked to."""
    act = abort_uploads if abort else list_uploads
    found = act(root, older_than=timedelta(hours=older_than_hours))
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(found)).decode())
        return
    table = Table("key", "begun (UTC)", "upload", box=None)
    for upload in found:
        begun = datetime.fromtimestamp(upload.started_unix_s, UTC).strftime("%Y-%m-%d %H:%M:%S")
        table.add_row(upload.key, begun, upload.id)
    console = Console()
    console.print(table)
    said = "Aborted" if abort else "--abort would abort"
    console.print(f"{said} {len(found)} unfinished upload(s).", highlight=False)
