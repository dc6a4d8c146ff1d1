"""`memory://`: objects of this process, for tests and for trying things out."""

from __future__ import annotations

from ckpt_cloud.stores.base import ANY, Buffer, Condition, Source
from ckpt_cloud.stores.native import NativeStore


class MemoryStore(NativeStore):
    """Copies what it is given: obstore's own would keep the caller's buffers, which change as training goes on."""

    async def put(self, key: str, data: Buffer, condition: Condition = ANY) -> str | None:
        return await super().put(key, bytes(data), condition)

    async def put_multipart(self, key: str, source: Source, *, part_size: int, concurrency: int) -> str | None:
        del part_size, concurrency  # there are no requests
        whole = bytearray()
        async for buffer in source():
            whole += buffer
            # Not held across the wait for the next one, which may need its share of the budget.
            del buffer
        return await super().put(key, bytes(whole))
