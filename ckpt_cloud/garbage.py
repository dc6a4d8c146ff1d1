"""Python's cyclic garbage collector, out of the way while many small objects are made that hold no cycles.

Every so many new objects the collector looks at all there are, which with torch loaded takes a fifth of a second: more
than to plan a checkpoint of thousands of tensors. It is not switched off, since other threads may go on meanwhile, and
other ranks may be long in coming: it only comes rarely.
"""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_RARELY = 1_000_000
"""New objects between two collections; Python has 700."""

# The only state of this module, all idempotent since a signal may come at any moment: the threads that pause it, how
# deep this one is in pauses, and the thresholds that there were before the first.
_lock = threading.RLock()
_pausing: set[int] = set()
_mine = threading.local()
_before = gc.get_threshold()


@contextmanager
def paused() -> Iterator[None]:
    """Collections of cycles in this process are rare meanwhile; one pause may lie within another."""
    with _changed(_depth() + 1):
        yield


@contextmanager
def resumed() -> Iterator[None]:
    """Collections as they were before this thread's pauses; for a wait within them that may last."""
    with _changed(0):
        yield


def _depth() -> int:
    return getattr(_mine, "depth", 0)


@contextmanager
def _changed(depth: int) -> Iterator[None]:
    """This thread as deep in pauses meanwhile."""
    before = _depth()
    try:
        _set(depth)
        yield
    finally:
        _set(before)


def _set(depth: int) -> None:
    global _before  # noqa: PLW0603 - the collector is the process's
    _mine.depth = depth
    with _lock:
        if depth and not _pausing:
            _before = gc.get_threshold()
            # 0 is never.
            if 0 < _before[0] < _RARELY:
                gc.set_threshold(_RARELY, *_before[1:])
        (_pausing.add if depth else _pausing.discard)(threading.get_ident())
        if not _pausing:
            _restore()


def _restore() -> None:
    """What somebody else has set meanwhile stays."""
    if gc.get_threshold() == (_RARELY, *_before[1:]):
        gc.set_threshold(*_before)


def _forget_after_fork() -> None:
    """The child may never come back to where it was forked."""
    global _lock  # noqa: PLW0603
    _lock = threading.RLock()
    _pausing.clear()
    _mine.depth = 0
    _restore()


os.register_at_fork(after_in_child=_forget_after_fork)
