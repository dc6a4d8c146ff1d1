"""One budget of bytes for everything that is staged or fetched and not yet let go."""

from __future__ import annotations

import asyncio
import weakref
from collections import deque


class Budget:
    """Bytes, or requests, that may exist at once, given out first come, first served.

    Belongs to one event loop. A single request for more than the whole budget is granted alone.
    """

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        # All three change with every grant and every return.
        self.used_bytes = 0
        self.peak_bytes = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    def __repr__(self) -> str:
        return f"<Budget {self.used_bytes} of {self.total_bytes} bytes used, {len(self._waiting)} waiting>"

    async def take(self, size_bytes: int) -> None:
        """Waits until `size_bytes` are free, and takes them."""
        if not self._waiting and self._fits(size_bytes):
            self._grant(size_bytes)
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((size_bytes, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give_back(size_bytes)
            else:
                # Whoever stood behind may fit where this one did not.
                self._serve()
            raise

    def give_back(self, size_bytes: int) -> None:
        """Returns what was taken. Only from the budget's loop."""
        self.used_bytes -= size_bytes
        self._serve()

    def give_back_with(self, last: memoryview, size_bytes: int) -> None:
        """Returns what was taken when `last` is let go, wherever it was handed to."""
        loop = asyncio.get_running_loop()
        weakref.finalize(last, _return_later, loop, self, size_bytes).atexit = False

    def _fits(self, size_bytes: int) -> bool:
        return self.used_bytes == 0 or self.used_bytes + size_bytes <= self.total_bytes

    def _grant(self, size_bytes: int) -> None:
        self.used_bytes += size_bytes
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)

    def _serve(self) -> None:
        while self._waiting:
            size_bytes, turn = self._waiting[0]
            if turn.cancelled():
                self._waiting.popleft()
            elif self._fits(size_bytes):
                self._waiting.popleft()
                self._grant(size_bytes)
                turn.set_result(None)
            else:
                return


def _return_later(loop: asyncio.AbstractEventLoop, budget: Budget, size_bytes: int) -> None:
    """Called on whichever thread let it go."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(budget.give_back, size_bytes)
