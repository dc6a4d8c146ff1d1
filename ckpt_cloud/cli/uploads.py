"""`ckpt-cloud uploads`."""

from __future__ import annotations

from datetime import timedelta

from rich.table import Column, Table

from ckpt_cloud.cli.ending import confirm, interruptible
from ckpt_cloud.cli.nearby import check_not_empty
from ckpt_cloud.cli.output import console, print_json, utc
from ckpt_cloud.uploads import abort_uploads, list_uploads


def run(root: str, *, older_than_hours: float, abort: bool, yes: bool, as_json: bool) -> None:
    """Prints the unfinished uploads under `root`, oldest first; aborts them if asked to, and if the user agrees."""
    age = timedelta(hours=older_than_hours)
    found = list_uploads(root, older_than=age)
    if not found and not list_uploads(root, older_than=timedelta(0)):
        check_not_empty(root, "nothing lies here, and no upload is unfinished")
    if not as_json and found:
        table = Table(Column("key", overflow="fold"), "begun (UTC)", "upload", box=None)
        for upload in found:
            table.add_row(upload.key, utc(upload.started_unix_s), upload.id)
        console.print(table)
    if abort and found:
        confirm(f"Abort {len(found)} upload(s)?", yes=yes)
        with interruptible("some uploads are aborted; run it again to finish"):
            found = abort_uploads(root, older_than=age)
    if as_json:
        print_json(found)
    else:
        said = "Aborted" if abort else "--abort would abort"
        console.print(f"{said} {len(found)} unfinished upload(s).")
