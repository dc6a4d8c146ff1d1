"""How many requests may be in flight: fewer when the store asks for fewer, more again as it answers."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from ckpt_cloud.errors import Throttled

_CUT = 0.5


@dataclass(frozen=True, slots=True)
class Pass:
    """Leave to send one request; `number` counts them in the order in which they were given."""

    number: int


class Pace:
    """Additive increase, multiplicative decrease (RFC 5681, section 3.1, with requests for bytes).

    There is no limit until the store throttles for the first time: callers bound themselves. Then half of what was in
    flight is the limit; each full round of answers raises it by one. Belongs to one event loop.
    """

    def __init__(self) -> None:
        # All change with every request.
        self.limit: int | None = None
        self.in_flight = 0
        self._given = 0
        self._answered = 0
        self._cut_at = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    def __repr__(self) -> str:
        return f"<Pace {self.in_flight} in flight of {self.limit or 'any'}, {len(self._waiting)} waiting>"

    @asynccontextmanager
    async def turn(self, requests: int = 1) -> AsyncIterator[None]:
        """The turn of one request, or of as many at once, which ends with the block; how it ends sets the pace."""
        mine = [await self.enter() for _ in range(requests)]
        try:
            yield
        except Throttled:
            self.throttled(mine[-1])
            raise
        else:
            self.answered()
        finally:
            for _ in mine:
                self.leave()

    async def enter(self) -> Pass:
        """Waits for a turn, first come, first served; every `enter` needs a `leave`."""
        if self._full() or self._waiting:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self.leave()
                raise
        else:
            self.in_flight += 1
        self._given += 1
        return Pass(self._given)

    def leave(self) -> None:
        """The request is over, however it ended. Only from the loop."""
        self.in_flight -= 1
        self._serve()

    def answered(self) -> None:
        """The store took a request: after a whole round of them there may be one more in flight."""
        if self.limit is not None:
            self._answered += 1
            if self._answered >= self.limit:
                self._answered = 0
                self.limit += 1
                self._serve()

    def throttled(self, refused: Pass) -> None:
        """The store refused one: half as many from now on, at least one. Only once for those that flew together."""
        if refused.number <= self._cut_at:
            return
        flying = self.in_flight if self.limit is None else min(self.limit, self.in_flight)
        self.limit = max(1, int(flying * _CUT))
        self._cut_at = self._given
        self._answered = 0

    def _full(self) -> bool:
        return self.limit is not None and self.in_flight >= self.limit

    def _serve(self) -> None:
        while self._waiting and not self._full():
            turn = self._waiting.popleft()
            if not turn.cancelled():
                self.in_flight += 1
                turn.set_result(None)
