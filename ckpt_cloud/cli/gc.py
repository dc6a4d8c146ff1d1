"""`ckpt-cloud gc`."""

from __future__ import annotations

from datetime import timedelta

from rich.filesize import decimal
from rich.table import Column, Table

from ckpt_cloud.cli.ending import confirm, interruptible
from ckpt_cloud.cli.nearby import check_not_empty
from ckpt_cloud.cli.output import console, note, print_json
from ckpt_cloud.collector import Collected, gc
from ckpt_cloud.encryption import Keyring

_SHOWN = 50


def run(root: str, keys: Keyring, *, older_than_hours: float, delete: bool, yes: bool, as_json: bool) -> None:
    """Prints what no checkpoint under `root` needs; deletes it if asked to, and if the user agrees."""
    age = timedelta(hours=older_than_hours)
    found = gc(root, older_than=age, dry_run=True, encryption_key=keys)
    if not (found.objects or found.uploads or found.skipped):
        check_not_empty(root, "nothing lies here")
    for url, reason in found.skipped:
        note(f"skipped {url}: {reason}")
    if not delete:
        _print(found, as_json=as_json, said="--delete would delete")
        return
    if not as_json:
        _print(found, as_json=False, said="To be deleted:")
    if found.objects or found.uploads:
        confirm("Delete them?", yes=yes)
        with interruptible("every checkpoint is whole, a part of the garbage is gone; run it again to finish"):
            found = gc(root, older_than=age, encryption_key=keys)
    if as_json:
        print_json(found)
    else:
        console.print(f"Deleted {_counted(found)}.")


def _print(found: Collected, *, as_json: bool, said: str) -> None:
    if as_json:
        print_json(found)
        return
    table = Table(Column("object", overflow="fold"), "size", box=None)
    for garbage in found.objects[:_SHOWN]:
        table.add_row(garbage.key, decimal(garbage.size_bytes))
    if len(found.objects) > _SHOWN:
        table.add_row(f"... and {len(found.objects) - _SHOWN} more", "")
    if found.objects:
        console.print(table)
    console.print(f"{said} {_counted(found)}.")


def _counted(found: Collected) -> str:
    size = decimal(found.size_bytes)
    return f"{len(found.objects)} object(s), {size}, and {len(found.uploads)} unfinished upload(s)"
