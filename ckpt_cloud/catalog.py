"""Checkpoints under a root URL."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass, field
from typing import Literal

from ckpt_cloud import bridge
from ckpt_cloud.commit import read_register
from ckpt_cloud.errors import CorruptCommit, Unsupported
from ckpt_cloud.format.layout import DATA_PREFIX, id_unix_ms
from ckpt_cloud.options import StoreOptions
from ckpt_cloud.stores import Location, ObjectStore, open_store, parse_url

_LOOKS_AT_ONCE = 32


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """One checkpoint URL under a root.

    Attributes:
        url: of the checkpoint.
        name: its last path segment.
        state: of its register; `incomplete` is data without a commit, `unreadable` a register that does not decode
            or is of a newer version.
        attempt: id of the save, time-ordered; empty when there is none.
        saved_unix_s: when that save began, in seconds since 1970; 0 when there is none.
        metrics: that were saved with it, such as a loss.
    """

    url: str
    name: str
    state: Literal["committed", "aborted", "deleted", "incomplete", "unreadable"]
    attempt: str = ""
    saved_unix_s: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)


def list_checkpoints(root: str | os.PathLike[str], *, store: StoreOptions | None = None) -> list[CheckpointInfo]:
    """All checkpoints right under `root`, oldest first; those without a commit come first.

    One LIST, and one small GET for each.
    """
    return bridge.run(_list(parse_url(root), store or StoreOptions()))


def latest(root: str | os.PathLike[str], *, store: StoreOptions | None = None) -> str | None:
    """URL of the newest committed checkpoint right under `root`, or None.

    Newest is the one whose save began last. What is incomplete, deleted or unreadable is passed over.
    """
    committed = [info for info in list_checkpoints(root, store=store) if info.state == "committed"]
    return committed[-1].url if committed else None


async def _list(root: Location, options: StoreOptions) -> list[CheckpointInfo]:
    store = open_store(root, options, first_contact=True)
    # `data` is a part of a checkpoint, or a probe's place, and no checkpoint.
    names = [name for name in await store.list_children() if name != DATA_PREFIX.rstrip("/")]
    gate = asyncio.Semaphore(_LOOKS_AT_ONCE)

    async def look(name: str) -> CheckpointInfo:
        async with gate:
            return await _look(store, root.child(name).url, name, under=name)

    found = await asyncio.gather(*(look(name) for name in names))
    return sorted(found, key=lambda info: (info.attempt, info.name))


async def describe(store: ObjectStore, location: Location) -> CheckpointInfo:
    """What is at `location`, which `store` is at."""
    return await _look(store, location.url, location.path.rpartition("/")[2], under="")


async def _look(store: ObjectStore, url: str, name: str, *, under: str) -> CheckpointInfo:
    try:
        register = (await read_register(store, under=under)).register
    except (CorruptCommit, Unsupported):
        return CheckpointInfo(url, name, "unreadable")
    if register is None:
        return CheckpointInfo(url, name, "incomplete")
    saved = id_unix_ms(register.attempt) / 1000
    metrics = register.metrics or {}
    return CheckpointInfo(url, name, register.state, register.attempt, saved, metrics)
