"""Bare obstore with the same bytes: no DCP, no tensors, no checksums. The limit that a checkpoint can reach."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import obstore
from obstore.store import S3Store

from bench_dcp.meter import Meter

MIB = 1 << 20
OBJECTS = 8


def run(direction: str, prefix: str, size: int, objects: int, part_mib: int, in_flight: int) -> dict[str, float]:
    """Puts or gets `size` bytes.

    Args:
        objects: how many are under way at a time, of 8.
        part_mib: of a multipart upload, or of one ranged read.
        in_flight: requests in all.
    """
    return asyncio.run(_run(direction, prefix, size, objects, part_mib * MIB, in_flight))


async def _run(direction: str, prefix: str, size: int, objects: int, part: int, in_flight: int) -> dict[str, float]:
    store = _store()
    await obstore.put_async(store, f"{prefix}/tiny-{os.getpid()}.bin", b"tiny")
    keys = [f"{prefix}/{number}.bin" for number in range(OBJECTS)]
    each = size // OBJECTS
    if direction == "up":
        data = memoryview(np.random.default_rng(0).bytes(each * OBJECTS))
        with Meter() as meter:
            await _up(
                store, {key: data[n * each : (n + 1) * each] for n, key in enumerate(keys)}, objects, part, in_flight
            )
    else:
        with Meter() as meter:
            await _down(store, keys, each, part, in_flight)
    return {**meter.figures, "bytes": each * OBJECTS}


async def _up(store: Any, bodies: dict[str, memoryview], objects: int, part: int, in_flight: int) -> None:
    gate = asyncio.Semaphore(objects)

    async def one(key: str, body: memoryview) -> None:
        async with gate:
            await obstore.put_async(
                store, key, _parts(body, part), chunk_size=part, max_concurrency=max(1, in_flight // objects)
            )

    await asyncio.gather(*(one(key, body) for key, body in bodies.items()))


async def _down(store: Any, keys: list[str], each: int, part: int, in_flight: int) -> None:
    gate = asyncio.Semaphore(in_flight)

    async def one(key: str, start: int) -> int:
        async with gate:
            return len(await obstore.get_range_async(store, key, start=start, end=min(start + part, each)))

    sizes = await asyncio.gather(*(one(key, start) for key in keys for start in range(0, each, part)))
    assert sum(sizes) == each * len(keys)


def _parts(body: memoryview, part: int) -> Iterator[memoryview]:
    for start in range(0, len(body), part):
        yield body[start : start + part]


def _store() -> Any:
    env = os.environ
    return S3Store(
        "bench",
        endpoint=env["AWS_ENDPOINT_URL"],
        access_key_id=env["AWS_ACCESS_KEY_ID"],
        secret_access_key=env["AWS_SECRET_ACCESS_KEY"],
        region=env["AWS_REGION"],
        unsigned_payload=True,
        virtual_hosted_style_request=False,
        client_options={"allow_http": True, "timeout": "300s"},
    )
