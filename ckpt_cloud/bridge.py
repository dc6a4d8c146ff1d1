"""Sync over async: one private event loop in one daemon thread per process, behind DCP's synchronous hooks.

The thread starts with the first call and is never shared with the user's loops. A child forked before that has its
own; one forked later is told that it cannot go on.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError as FutureCancelled
from concurrent.futures import Future, wait
from typing import Any, TypeVar

from ckpt_cloud import garbage
from ckpt_cloud.errors import AttemptAborted, Unsupported

T = TypeVar("T")

_STOP_S = 5.0
_CLEANUP_S = 15.0
"""Longer than a store takes to abort an upload, or gives up on it."""
_SETTLE_S = 0.1
"""For the engine's own threads to let go of Python objects: one that needs the interpreter once it is going aborts the
process (https://docs.python.org/3.11/c-api/init.html#c.PyGILState_Ensure)."""
_UNCOLLECTED_S = 5.0
"""A pause of the garbage collector goes on for so long."""

_lock = threading.Lock()
# The only state of this module: the loop of this process, reset in a forked child, and whether this is such a child.
_loop: asyncio.AbstractEventLoop | None = None
_forked_after_use = False


def run(work: Coroutine[Any, Any, T]) -> T:
    """Runs `work` on the private loop and returns its result.

    KeyboardInterrupt cancels it, and waits until it has cleaned up: what it began must not outlive the process. A
    second one does not wait.
    """
    if _forked_after_use:
        work.close()
        hint = "start the process with spawn or forkserver, or call ckpt_cloud only after the fork"
        raise Unsupported(
            "this process was forked from one that had used ckpt_cloud; stores do not survive that", hint=hint
        )
    begun, ended = threading.Event(), threading.Event()
    future = asyncio.run_coroutine_threadsafe(_noting(work, begun, ended), event_loop())
    try:
        return _result(future)
    except KeyboardInterrupt:
        # Work that is cancelled before its first step has no end.
        begun.wait(_CLEANUP_S)
        future.cancel()
        ended.wait(_CLEANUP_S)
        raise
    except FutureCancelled as cancelled:
        raise asyncio.CancelledError from cancelled


def _result(future: Future[T]) -> T:
    if wait([future], _UNCOLLECTED_S).done:
        return future.result()
    with garbage.resumed():
        return future.result()


async def _noting(work: Coroutine[Any, Any, T], begun: threading.Event, ended: threading.Event) -> T:
    begun.set()
    try:
        return await work
    finally:
        ended.set()


class Stop:
    """Ends work on the private loop from another thread: what is under way, and what begins later."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Both change under the lock: whether it was asked for, and how to end what is under way.
        self._asked = False
        self._cancel: Callable[[], object] | None = None

    def set(self) -> None:
        """Asks for it; does not wait."""
        with self._lock:
            self._asked = True
            cancel = self._cancel
        if cancel is not None:
            cancel()

    def check(self) -> None:
        """Raises AttemptAborted if it was asked for."""
        if self._asked:
            raise AttemptAborted("this save was ended before it could commit", hint="what it had uploaded is deleted")

    async def over(self, work: Coroutine[Any, Any, T]) -> T:
        """Awaits `work`, to the end of its cleaning up when it is ended.

        Raises:
            AttemptAborted: it was.
        """
        loop, task = asyncio.get_running_loop(), asyncio.ensure_future(work)
        with self._lock:
            self._cancel = lambda: loop.call_soon_threadsafe(task.cancel)
        if self._asked:
            task.cancel()
        try:
            return await task
        except asyncio.CancelledError:
            self.check()
            raise
        finally:
            with self._lock:
                self._cancel = None


def event_loop() -> asyncio.AbstractEventLoop:
    """The private loop of this process; started when first asked for."""
    global _loop  # noqa: PLW0603 - one loop per process
    with _lock:
        if _loop is None or _loop.is_closed():
            _loop = _start()
        return _loop


def _start() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="ckpt_cloud-loop", daemon=True)
    thread.start()
    atexit.register(_stop, loop, thread, os.getpid())
    return loop


def _stop(loop: asyncio.AbstractEventLoop, thread: threading.Thread, pid: int) -> None:
    """Ends the loop before the interpreter goes, so that no callback meets a half-finalized one."""
    if os.getpid() == pid and not loop.is_closed():
        loop.call_soon_threadsafe(loop.stop)
        thread.join(_STOP_S)
        threading.Event().wait(_SETTLE_S)


def _forget_after_fork() -> None:
    global _loop, _lock, _forked_after_use  # noqa: PLW0603 - the threads are gone in the child
    # obstore's runtime lost its threads too, and cannot be started anew.
    _forked_after_use = _forked_after_use or _loop is not None
    _loop = None
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_forget_after_fork)
