"""Threads for copies and checksums, which release the GIL, and for blocking file calls.

Not `concurrent.futures`: its pools refuse work as soon as the interpreter begins to exit, which is when the last
asynchronous save of a training run may still be under way.
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

_Job = tuple[asyncio.AbstractEventLoop, "asyncio.Future[Any]", Callable[[], Any]]

COUNT = min(8, (os.cpu_count() or 2) + 2)
"""More threads than cores only contend; a few more keep the cores busy while some wait for the disk."""

_lock = threading.Lock()
# The only state of this module, reset in a forked child: jobs for the threads, once there are threads.
_jobs: queue.SimpleQueue[_Job] | None = None


async def in_thread(call: Callable[..., T], *args: Any) -> T:
    """Runs `call(*args)` on a worker thread. Cancelling the wait does not stop the call."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()
    _started().put((loop, future, lambda: call(*args)))
    return await future


def _started() -> queue.SimpleQueue[_Job]:
    global _jobs  # noqa: PLW0603 - one pool per process
    with _lock:
        if _jobs is None:
            _jobs = queue.SimpleQueue()
            for number in range(COUNT):
                name = f"ckpt_cloud-worker-{number}"
                threading.Thread(target=_work, args=(_jobs,), name=name, daemon=True).start()
        return _jobs


def _work(jobs: queue.SimpleQueue[_Job]) -> None:
    while True:
        _run(*jobs.get())


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
    global _jobs, _lock  # noqa: PLW0603 - the threads are gone in the child
    _jobs = None
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_forget_after_fork)
