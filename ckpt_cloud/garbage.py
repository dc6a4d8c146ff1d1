"""Python's cyclic garbage collector, out of the way while many small objects are made that hold no cycles.

Every so many new objects the collector looks at all there are, which with torch loaded takes a fifth of a second: more
than to plan a checkpoint of thousands of tensors.
"""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
# The only state of this module: how many threads pause it, whether it was on before the first, and this thread's part.
_pauses = 0
_was_on = False
_mine = threading.local()


@contextmanager
def paused() -> Iterator[None]:
    """No collection of cycles in this process meanwhile; one pause may lie within another."""
    depth = getattr(_mine, "depth", 0)
    with _changed(depth + 1):
        yield


@contextmanager
def resumed() -> Iterator[None]:
    """Collections as they were before this thread's pauses; for a wait within them that may last."""
    with _changed(0):
        yield


@contextmanager
def _changed(depth: int) -> Iterator[None]:
    """This thread as deep in pauses meanwhile."""
    before = getattr(_mine, "depth", 0)
    _set(before, depth)
    try:
        yield
    finally:
        _set(depth, before)


def _set(before: int, after: int) -> None:
    global _pauses, _was_on  # noqa: PLW0603 - the collector is the process's
    _mine.depth = after
    change = (after > 0) - (before > 0)
    if not change:
        return
    with _lock:
        if _pauses == 0:
            _was_on = gc.isenabled()
        _pauses += change
        if _was_on:
            (gc.disable if _pauses else gc.enable)()


def _forget_after_fork() -> None:
    """Of all threads only the one that forked is in the child."""
    global _lock, _pauses  # noqa: PLW0603
    _lock = threading.Lock()
    if _pauses:
        _pauses = int(getattr(_mine, "depth", 0) > 0)
        if _was_on and not _pauses:
            gc.enable()


os.register_at_fork(after_in_child=_forget_after_fork)
