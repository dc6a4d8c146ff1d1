"""`ckpt-cloud doctor`."""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import typer
from rich.filesize import decimal
from rich.table import Table

from ckpt_cloud import bridge
from ckpt_cloud.cli.ending import WRONG, interruptible
from ckpt_cloud.cli.output import console, print_json
from ckpt_cloud.errors import CkptCloudError, Unsupported
from ckpt_cloud.format.layout import DATA_PREFIX, mint_id
from ckpt_cloud.options import MIB, StoreOptions, TransferOptions
from ckpt_cloud.preflight import Check, examine
from ckpt_cloud.stores import Location, open_store, parse_url
from ckpt_cloud.stores.lifecycle import days_to_abort
from ckpt_cloud.transfer.structured import all_or_cancel

_LANES = (4, 16, 32)
"""Requests in flight that are tried."""
_WORTH = 1.15
"""More requests in flight are advised where they bring that much more."""


@dataclass(frozen=True, slots=True)
class Speed:
    """Bytes per second with so many requests in flight."""

    requests: int
    up_bytes_per_s: float
    down_bytes_per_s: float


@dataclass(slots=True)
class Diagnosis:
    """What was found out about a place."""

    url: str
    checks: list[dict[str, object]] = field(default_factory=list)
    unfinished_uploads: str = ""
    speeds: list[Speed] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)


def run(url: str, *, size_mib: int, as_json: bool) -> None:
    """Tries out a place for checkpoints, measures it, and advises."""
    location = parse_url(url)
    with interruptible("probes may be left below data/; ckpt-cloud gc collects them"):
        checks = examine(location, StoreOptions())
        found = Diagnosis(location.url, [_plain(check) for check in checks])
        works = {check.name for check in checks if check.outcome == "ok"}
        found.unfinished_uploads = bridge.run(_lifecycle(location))
        if size_mib and {"write", "read a range", "delete"} <= works:
            found.speeds = bridge.run(_measure(location, size_mib * MIB))
        found.advice = _advice(checks, found)
    if as_json:
        print_json(found)
    else:
        _print(checks, found)
    if any(check.outcome == "failed" for check in checks):
        raise typer.Exit(WRONG)


def _plain(check: Check) -> dict[str, object]:
    return {
        "name": check.name,
        "outcome": check.outcome,
        "needed_for": check.needed_for,
        "detail": check.detail,
        "seconds": round(check.seconds, 4),
    }


async def _lifecycle(location: Location) -> str:
    try:
        days = await days_to_abort(location, StoreOptions())
    except Unsupported:
        return "the store does not tell"
    except CkptCloudError as error:
        return f"could not be read: {error.message}"
    return "never ended by the store" if days is None else f"ended by the store after {days} day(s)"


async def _measure(location: Location, size: int) -> list[Speed]:
    """Uploads objects of a part each, reads them back, and deletes them; once for each number of requests."""
    store = open_store(location, StoreOptions())
    part = min(TransferOptions().part_size, size)
    body = os.urandom(part)
    speeds = []
    for lanes in _LANES:
        id_ = mint_id(time.time_ns() // 1_000_000, os.urandom(10))
        keys = [f"{DATA_PREFIX}{id_}/{number}.safetensors" for number in range(max(1, size // part))]
        try:
            up = await _timed(keys, lanes, lambda key: store.put(key, body))
            down = await _timed(keys, lanes, lambda key: store.get_range(key, 0, part))
        finally:
            await store.delete(keys)
        total = part * len(keys)
        speeds.append(Speed(lanes, total / up, total / down))
    return speeds


async def _timed(keys: list[str], lanes: int, act: Callable[[str], Awaitable[object]]) -> float:
    queue = iter(keys)

    async def drain() -> None:
        for key in queue:
            await act(key)

    began = time.perf_counter()
    await all_or_cancel(drain() for _ in range(min(lanes, len(keys))))
    return time.perf_counter() - began


def _advice(checks: list[Check], found: Diagnosis) -> list[str]:
    failed = [check for check in checks if check.outcome == "failed"]
    advice = [f"{check.name} failed (needed for {check.needed_for}): {check.detail}" for check in failed]
    if found.unfinished_uploads.startswith("never"):
        advice.append(
            "add a lifecycle rule AbortIncompleteMultipartUpload of 2 days, or run ckpt-cloud gc: a killed job leaves "
            "uploads that no listing shows and that are billed"
        )
    if found.speeds:
        advice.append(_advised_requests(found.speeds))
    return advice


def _advised_requests(speeds: list[Speed]) -> str:
    """The fewest requests in flight that are about as fast as any, unless the default is."""
    total = {speed.requests: speed.up_bytes_per_s + speed.down_bytes_per_s for speed in speeds}
    best, default = max(total.values()), TransferOptions().max_requests
    if total[default] * _WORTH >= best:
        return f"the default of {default} requests in flight is right from this machine"
    chosen = next(requests for requests in sorted(total) if total[requests] * _WORTH >= best)
    return f"TransferOptions(max_requests={chosen}) is faster from this machine than the default of {default}"


def _print(checks: list[Check], found: Diagnosis) -> None:
    console.print(found.url)
    table = Table("check", "outcome", "needed for", "seconds", box=None)
    for check in checks:
        table.add_row(check.name, check.outcome, check.needed_for, f"{check.seconds:.3f}")
    console.print(table)
    console.print(f"unfinished uploads: {found.unfinished_uploads}")
    if found.speeds:
        speeds = Table("requests in flight", "up", "down", box=None)
        for speed in found.speeds:
            rates = [f"{decimal(int(rate))}/s" for rate in (speed.up_bytes_per_s, speed.down_bytes_per_s)]
            speeds.add_row(str(speed.requests), *rates)
        console.print(speeds)
    for line in found.advice:
        console.print(f"→ {line}")
