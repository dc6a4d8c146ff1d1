"""What a store lets us do, tried one thing after another: before the first step, and for `ckpt-cloud doctor`."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Literal

from ckpt_cloud import bridge
from ckpt_cloud.errors import (
    AlreadyExists,
    CkptCloudError,
    NotFound,
    PreconditionFailed,
    Unsupported,
)
from ckpt_cloud.format.layout import DATA_PREFIX, mint_id
from ckpt_cloud.options import StoreOptions
from ckpt_cloud.stores import CREATE, Location, ObjectStore, Replace, open_store
from ckpt_cloud.stores.base import Buffer

PART = 5 << 20
"""Least part of a multipart upload on S3."""
_PROBE = b"ckpt-cloud probe"
_OTHER_VERSION = '"00000000000000000000000000000000"'

Outcome = Literal["ok", "failed", "skipped"]


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was tried.

    Attributes:
        name: of what was tried.
        outcome: `skipped` where an earlier failure leaves nothing to try, or the store does not tell.
        detail: why it failed or was skipped, and what to do.
        needed_for: what does not work without it.
        seconds: that it took.
        error: why it failed.
    """

    name: str
    outcome: Outcome
    needed_for: str
    detail: str = ""
    seconds: float = 0.0
    error: CkptCloudError | None = None


@dataclass(frozen=True, slots=True)
class Needs:
    """What a run will do.

    Attributes:
        writes: saving, not only loading.
        deletes: deleting old checkpoints too; otherwise a refusal to delete is passed over.
        conditional: commits that the store must keep atomic.
    """

    writes: bool
    deletes: bool
    conditional: bool


def require(location: Location, options: StoreOptions, needs: Needs) -> None:
    """Sees in a few small requests that a run's store is there and lets us do what the run will do.

    Raises:
        The first thing that does not work, as the store said it; Unsupported for conditions that it ignores.
    """
    store = open_store(location, options, first_contact=True)
    trials = _small(store) if needs.writes else [_listing(store)]
    trials = [trial for trial in trials if needs.conditional or not trial[0].startswith("conditional")]
    checks = bridge.run(_run(trials, stop=True))
    for check in checks:
        if check.error is not None and (check.name != "delete" or needs.deletes):
            raise check.error


def examine(location: Location, options: StoreOptions) -> list[Check]:
    """All that can be tried, each on its own; what fails does not end it, unless the store cannot be reached at all."""
    store = open_store(location, options, first_contact=True)
    return bridge.run(_run([*_small(store), *_large(store)], stop=False))


Trial = tuple[str, str, Callable[[], Awaitable[None]]]


async def _run(trials: list[Trial], *, stop: bool) -> list[Check]:
    found: list[Check] = []
    for name, needed_for, act in trials:
        if found and found[0].error is not None and not _answered(found[0].error):
            found.append(Check(name, "skipped", needed_for, "the store cannot be reached"))
            continue
        found.append(await _try(name, needed_for, act))
        if stop and found[-1].error is not None and name != "delete":
            break
    return found


def _answered(error: CkptCloudError) -> bool:
    return error.kind == "permission-denied"


async def _try(name: str, needed_for: str, act: Callable[[], Awaitable[None]]) -> Check:
    began = time.perf_counter()
    try:
        await act()
    except Unsupported as error:
        skipped = error.message.startswith("not told")
        outcome: Outcome = "skipped" if skipped else "failed"
        return Check(name, outcome, needed_for, str(error), time.perf_counter() - began, None if skipped else error)
    except CkptCloudError as error:
        return Check(name, "failed", needed_for, str(error), time.perf_counter() - began, error)
    return Check(name, "ok", needed_for, "", time.perf_counter() - began)


def _listing(store: ObjectStore) -> Trial:
    async def act() -> None:
        await store.list_children()

    return "list", "finding checkpoints, collecting garbage", act


def _small(store: ObjectStore) -> list[Trial]:
    """Trials on one small object, under a name that a collector would remove."""
    key = f"{DATA_PREFIX}{mint_id(time.time_ns() // 1_000_000, os.urandom(10))}/probe"

    async def write() -> None:
        await store.put(key, _PROBE)

    async def read() -> None:
        await store.get(key, limit=len(_PROBE))

    async def read_range() -> None:
        await store.get_range(key, 5, 10)

    async def create() -> None:
        await _refused(store, store.put(key, _PROBE, CREATE), "create-only writes (If-None-Match)")

    async def replace() -> None:
        await _refused(store, store.put(key, _PROBE, Replace(_OTHER_VERSION)), "replace-only writes (If-Match)")

    async def delete() -> None:
        await store.delete([key])

    return [
        _listing(store),
        ("write", "saving", write),
        ("read", "loading", read),
        ("conditional create", "committing", create),
        ("conditional replace", "committing", replace),
        ("read a range", "loading", read_range),
        ("delete", "deleting checkpoints, collecting garbage", delete),
    ]


async def _refused(store: ObjectStore, put: Awaitable[object], what: str) -> None:
    """Sees that a write whose condition does not hold is refused for it."""
    try:
        await put
    except (AlreadyExists, PreconditionFailed, NotFound):
        return
    hint = "use a store that keeps them, or, if nobody else ever saves there, allow_unsafe_commit=True"
    raise Unsupported(f"the store ignores {what}, so a commit could not be atomic", store.url, hint)


def _large(store: ObjectStore) -> list[Trial]:
    key = f"{DATA_PREFIX}{mint_id(time.time_ns() // 1_000_000, os.urandom(10))}/probe"

    async def body() -> AsyncIterator[Buffer]:
        for _ in range(2):
            yield bytes(PART)

    async def multipart() -> None:
        try:
            await store.put_multipart(key, body, part_size=PART, concurrency=2)
        finally:
            with contextlib.suppress(CkptCloudError):
                await store.delete([key])

    async def uploads() -> None:
        try:
            await store.list_uploads()
        except Unsupported as error:
            raise Unsupported(f"not told: {error.message}", store.url, error.hint) from None

    return [
        ("multipart upload", "saving objects of more than one part", multipart),
        ("list unfinished uploads", "collecting what crashes leave", uploads),
    ]
