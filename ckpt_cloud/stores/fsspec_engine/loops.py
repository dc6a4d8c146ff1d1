"""Between the caller's event loop and fsspec's own, where asynchronous filesystems keep their connections."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

_END_S = 10.0
"""For work on the other loop to end once it is cancelled."""
_CLOSE_S = 0.5
"""For a connection to be closed when its filesystem is let go."""


async def on_loop(loop: asyncio.AbstractEventLoop, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Runs `work()` on `loop` and waits for its end, also when cancelled: what it holds is free once this returns."""
    here = asyncio.get_running_loop()
    if here is loop:
        return await work()
    crossing = _Crossing(here, loop, work)
    loop.call_soon_threadsafe(crossing.start)
    try:
        return await asyncio.shield(crossing.outcome)
    except asyncio.CancelledError:
        # In the order of the calls: `start` has run by then.
        loop.call_soon_threadsafe(crossing.cancel)
        await asyncio.wait([crossing.outcome], timeout=_END_S)
        raise
    finally:
        # An error's traceback holds this frame; what holds the error must not be held by it.
        del crossing


async def at_once(work: Iterable[Callable[[], Awaitable[T]]], *, limit: int) -> Sequence[T]:
    """Runs all of `work`, at most `limit` at a time; the results in order. The first failure cancels the rest."""
    slots = asyncio.Semaphore(limit)

    async def one(item: Callable[[], Awaitable[T]]) -> T:
        async with slots:
            return await item()

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(item)) for item in work]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


class _Crossing:
    """One piece of work: `start` and `cancel` run on the loop `there`, `outcome` belongs to the loop `here`."""

    def __init__(
        self,
        here: asyncio.AbstractEventLoop,
        there: asyncio.AbstractEventLoop,
        work: Callable[[], Coroutine[Any, Any, Any]],
    ) -> None:
        self.outcome: asyncio.Future[Any] = here.create_future()
        # Nobody may be left to ask.
        self.outcome.add_done_callback(lambda outcome: outcome.cancelled() or outcome.exception())
        self._here = here
        self._there = there
        # What changes: the work becomes a task, and the task an outcome.
        self._work: Callable[[], Coroutine[Any, Any, Any]] | None = work
        self._task: asyncio.Task[Any] | None = None

    def start(self) -> None:
        assert self._work is not None
        self._task = self._there.create_task(self._work())
        self._work = None
        self._task.add_done_callback(self._ended)

    def cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._task = None
        if not self._here.is_closed():
            self._here.call_soon_threadsafe(_settle, self.outcome, *_outcome(task))


def _outcome(task: asyncio.Task[Any]) -> tuple[Any, BaseException | None]:
    if task.cancelled():
        return None, asyncio.CancelledError()
    error = task.exception()
    return (None, error) if error else (task.result(), None)


def _settle(outcome: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if outcome.done():
        return
    if isinstance(error, asyncio.CancelledError):
        outcome.cancel()
    elif error is not None:
        outcome.set_exception(error)
    else:
        outcome.set_result(result)


def close_on(loop: asyncio.AbstractEventLoop | None, close: Callable[[], Awaitable[Any]]) -> None:
    """Runs `close()` on `loop`; called from finalizers, on any thread, so it waits only for a moment."""
    if loop is None or loop.is_closed() or not loop.is_running():
        return

    async def closing() -> None:
        await close()

    if _running() is loop:
        _closing.add(task := loop.create_task(closing()))
        task.add_done_callback(_closing.discard)
        return
    try:
        asyncio.run_coroutine_threadsafe(closing(), loop).result(_CLOSE_S)
    except Exception:  # noqa: BLE001 - nobody is left to be told
        return


_closing: set[asyncio.Task[None]] = set()
"""Tasks that nobody else holds."""


def _running() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
