"""`ckpt-cloud resolve`."""

from __future__ import annotations

from ckpt_cloud import bridge
from ckpt_cloud.catalog import describe
from ckpt_cloud.cli.ending import interruptible
from ckpt_cloud.cli.output import console, print_json
from ckpt_cloud.collector import resolve
from ckpt_cloud.errors import CheckpointNotFound
from ckpt_cloud.format.layout import DATA_PREFIX
from ckpt_cloud.options import StoreOptions
from ckpt_cloud.stores import open_store, parse_url


def run(url: str, *, as_json: bool) -> None:
    """Settles what became of a save, and prints what is there."""
    # A save that may have committed has left data. Where there is none, a mistyped URL would get a register.
    check_save(url)
    with interruptible("nothing is settled; run it again"):
        info = resolve(url)
    if as_json:
        print_json(info)
    else:
        console.print(f"{info.state} {info.attempt}")


def check_save(url: str) -> None:
    """Refuses a place where no save has been."""
    location = parse_url(url)
    store = open_store(location, StoreOptions(), first_contact=True)
    state = bridge.run(describe(store, location)).state
    if state == "incomplete" and DATA_PREFIX.rstrip("/") not in bridge.run(store.list_children()):
        raise CheckpointNotFound("no save was here", location.url, "check the URL")
