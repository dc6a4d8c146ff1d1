"""Threads for copies and checksums, which release the GIL, and for blocking file calls.

Not `concurrent.futures`: its pools refuse work as soon as the interpreter begins to exit, which is when the last
asynchronous save of a training run may still be under way.
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

_Job = tuple[asyncio.AbstractEventLoop, "asyncio.Future[Any]", Callable[[], Any]]

COUNT = min(8, (os.cpu_count() or 2) + 2)
"""More threads than cores only contend; a few more keep the cores busy while some wait for the disk."""
_WAITING = 64
"""Threads that wait for the network may be many."""


class _Threads:
    """Up to `limit` daemon threads, started as they are needed."""

    def __init__(self, name: str, limit: int) -> None:
        self._name = name
        self._limit = limit
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        # Both change with every job: threads there are, and jobs that are waiting or being done.
        self._started = 0
        self._open = 0

    def put(self, job: _Job) -> None:
        with self._lock:
            self._open += 1
            if self._started < min(self._open, self._limit):
                name = f"ckpt_cloud-{self._name}-{self._started}"
                threading.Thread(target=self._work, name=name, daemon=True).start()
                self._started += 1
        self._jobs.put(job)

    def _work(self) -> None:
        while True:
            _run(*self._jobs.get())
            with self._lock:
                self._open -= 1


# The only state of this module, made anew in a forked child, which has none of the threads.
_computing = _Threads("worker", COUNT)
_waiting = _Threads("reader", _WAITING)


async def in_thread(call: Callable[..., T], *args: Any) -> T:
    """Runs `call(*args)` on a worker thread. Cancelling the wait does not stop the call."""
    return await _in(_computing, call, args)


async def in_waiting_thread(call: Callable[..., T], *args: Any) -> T:
    """The same, for calls that wait for the network rather than compute."""
    return await _in(_waiting, call, args)


async def to_the_end(work: Coroutine[Any, Any, T]) -> T:
    """Runs `work`; a cancellation meanwhile is passed on only once it has ended."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.gather(task, return_exceptions=True)
        raise


async def _in(threads: _Threads, call: Callable[..., T], args: tuple[Any, ...]) -> T:
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()
    threads.put((loop, future, lambda: call(*args)))
    return await future


def _run(loop: asyncio.AbstractEventLoop, future: asyncio.Future[Any], call: Callable[[], Any]) -> None:
    """One job; in a function of its own so that an idle thread holds on to no job's memory."""
    try:
        result, error = call(), None
    except BaseException as raised:  # noqa: BLE001 - raised again where the job was waited for
        result, error = None, raised
    if not loop.is_closed():
        loop.call_soon_threadsafe(_settle, future, result, error)


def _settle(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.cancelled():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)


def _forget_after_fork() -> None:
    global _computing, _waiting
    _computing, _waiting = _Threads("worker", COUNT), _Threads("reader", _WAITING)


os.register_at_fork(after_in_child=_forget_after_fork)
