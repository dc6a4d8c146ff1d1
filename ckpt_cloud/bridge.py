"""Sync over async: one private event loop in one daemon thread per process, behind DCP's synchronous hooks.

The thread starts with the first call, is rebuilt in a child after `fork`, and is never shared with the user's loops.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import CancelledError as FutureCancelled
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")

_lock = threading.Lock()
# The only state of this module: the loop of this process, reset in a forked child.
_loop: asyncio.AbstractEventLoop | None = None


def run(work: Coroutine[Any, Any, T]) -> T:
    """Runs `work` on the private loop and returns its result; KeyboardInterrupt cancels it."""
    future = asyncio.run_coroutine_threadsafe(work, event_loop())
    try:
        return future.result()
    except KeyboardInterrupt:
        future.cancel()
        raise
    except FutureCancelled as cancelled:
        raise asyncio.CancelledError from cancelled


def event_loop() -> asyncio.AbstractEventLoop:
    """The private loop of this process; started when first asked for."""
    global _loop
    with _lock:
        if _loop is None or _loop.is_closed():
            _loop = _start()
        return _loop


def _start() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    # Copies and checksums: they release the GIL, and more threads than cores only contend.
    loop.set_default_executor(ThreadPoolExecutor(min(8, (os.cpu_count() or 2) + 2), "ckpt_cloud-worker"))
    threading.Thread(target=loop.run_forever, name="ckpt_cloud-loop", daemon=True).start()
    return loop


def _forget_after_fork() -> None:
    global _loop, _lock
    _loop = None
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_forget_after_fork)
