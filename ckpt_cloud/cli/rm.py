"""`ckpt-cloud rm`."""

from __future__ import annotations

from dataclasses import dataclass

from rich.filesize import decimal

from ckpt_cloud import bridge
from ckpt_cloud.catalog import describe
from ckpt_cloud.cli.ending import confirm, interruptible
from ckpt_cloud.cli.output import console, note, print_json, utc
from ckpt_cloud.collector import delete
from ckpt_cloud.commit import rank_roots
from ckpt_cloud.errors import CheckpointIncomplete, CheckpointNotFound
from ckpt_cloud.format.layout import join
from ckpt_cloud.options import StoreOptions
from ckpt_cloud.stores import open_store, parse_url


@dataclass(frozen=True, slots=True)
class Doomed:
    """One checkpoint that is to be deleted."""

    url: str
    state: str
    saved_unix_s: float
    objects: int
    size_bytes: int


def run(urls: list[str], *, yes: bool, as_json: bool) -> None:
    """Shows what lies at `urls`, asks, and deletes it."""
    found = [bridge.run(_look(url)) for url in urls]
    for each in found:
        saved = f"saved {utc(each.saved_unix_s)} UTC, " if each.saved_unix_s else ""
        note(f"{each.url}: {each.state}, {saved}{each.objects} object(s), {decimal(each.size_bytes)}")
    confirm(f"Delete {'it' if len(found) == 1 else f'these {len(found)}'}?", yes=yes)
    with interruptible("what was deleted is gone, the rest is whole; run it again to finish"):
        for each in found:
            delete(each.url)
            if not as_json:
                console.print(f"deleted {each.url}")
    if as_json:
        print_json({"deleted": found})


async def _look(url: str) -> Doomed:
    location = parse_url(url)
    store = open_store(location, StoreOptions(), first_contact=True)
    info = await describe(store, location)
    ranks = await rank_roots(store)
    data = [each for place in ("", *ranks) async for each in store.list(join(place, "data"))]
    state = f"of {len(ranks)} single rank(s)" if ranks and info.state != "committed" else str(info.state)
    if info.state == "incomplete" and not data and not ranks:
        raise CheckpointNotFound("no checkpoint is here", location.url, "check the URL")
    if info.state == "incomplete" and not ranks:
        hint = "ckpt-cloud gc collects it"
        raise CheckpointIncomplete("there is data but no COMMIT: no checkpoint to delete", location.url, hint)
    return Doomed(location.url, state, info.saved_unix_s, len(data), sum(each.size for each in data))
