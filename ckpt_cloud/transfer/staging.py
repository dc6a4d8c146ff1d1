"""Buffers that parts are staged in: reused, and of one budget."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import numpy as np

from ckpt_cloud.transfer.budget import Budget

Allocate = Callable[[int], "np.ndarray[Any, np.dtype[np.uint8]]"]


class Staging:
    """Lends buffers, each within the budget and taken back by itself when the last user lets it go.

    What is about one part large is kept for the next part, since fresh memory costs as much as the copy into it. Memory
    that is lent and memory that is kept together stay within the budget. Belongs to one event loop.

    Args:
        budget: of bytes.
        part_size: of the buffers that are kept.
        allocate: makes a buffer of so many bytes.
    """

    def __init__(self, budget: Budget, part_size: int, allocate: Allocate) -> None:
        self._budget = budget
        self._part_size = part_size
        self._allocate = allocate
        # What changes: memory of one part each that nobody uses now.
        self._kept: list[np.ndarray[Any, np.dtype[np.uint8]]] = []

    def __repr__(self) -> str:
        return f"<Staging of {self._budget!r}, {len(self._kept)} parts kept>"

    async def lend(self, size_bytes: int) -> memoryview:
        """A writable buffer of `size_bytes`; whoever keeps it, or a slice of it, keeps its share of the budget."""
        whole = self._whole(size_bytes)
        await self._budget.take(whole)
        try:
            memory = self._memory(whole)
        except BaseException:
            self._budget.give_back(whole)
            raise
        # A fresh object exports the memory, so that its end is the end of all views of it.
        lent = memory[:size_bytes]
        loop = asyncio.get_running_loop()
        weakref.finalize(lent, _return_later, loop, self, memory).atexit = False
        return lent.data

    @asynccontextmanager
    async def lent(self, size_bytes: int, *, beside: int) -> AsyncIterator[memoryview | None]:
        """A buffer of `size_bytes`, or None for 0, for the block alone, which uses `beside` further bytes itself."""
        whole = self._whole(size_bytes)
        await self._budget.take(whole + beside)
        try:
            memory = self._memory(whole) if whole else None
        except BaseException:
            self._budget.give_back(whole + beside)
            raise
        try:
            yield memory[:size_bytes].data if memory is not None else None
        finally:
            self._budget.give_back(beside)
            if memory is not None:
                self.take_back(memory)

    def _whole(self, size_bytes: int) -> int:
        return self._part_size if self._part_size // 2 < size_bytes <= self._part_size else size_bytes

    def _memory(self, size_bytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        if size_bytes == self._part_size and self._kept:
            return self._kept.pop()
        while self._kept and self._budget.used_bytes + len(self._kept) * self._part_size > self._budget.total_bytes:
            self._kept.pop()
        return self._allocate(size_bytes)

    def take_back(self, memory: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        """`memory` is no longer used by anybody. Only from the loop."""
        if len(memory) == self._part_size:
            self._kept.append(memory)
        self._budget.give_back(len(memory))


def plain_memory(size_bytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Memory of the process, without a value."""
    return np.empty(size_bytes, dtype=np.uint8)


def _return_later(
    loop: asyncio.AbstractEventLoop, staging: Staging, memory: np.ndarray[Any, np.dtype[np.uint8]]
) -> None:
    """Called on whichever thread let the buffer go."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(staging.take_back, memory)
