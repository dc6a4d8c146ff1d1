"""DCP's log of its own calls, left out while nobody reads it.

DCP notes the begin and the end of every call at level DEBUG, when it saves also for each key of the dictionary: that is
20 to 40 µs of each, though the log goes nowhere unless a program gives it a handler.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_LOG = logging.getLogger("c10d-NullHandler-dcp_logger")
"""DCP's, while it has no handler of the program's own; another name then."""
_NOTHING = logging.CRITICAL + 1

# The only state of this module: who wants it muted, and the level that there was before the first.
_lock = threading.RLock()
_muting: set[object] = set()
_before = _LOG.level


@contextmanager
def muted() -> Iterator[None]:
    """DCP logs nothing meanwhile, in all threads, if nobody would have seen it. May end in another thread."""
    who = object()
    try:
        _begin(who)
        yield
    finally:
        _end(who)


def _begin(who: object) -> None:
    global _before  # noqa: PLW0603 - the log is the process's
    with _lock:
        if not _muting and _unread():
            _before = _LOG.level
            _LOG.setLevel(_NOTHING)
        _muting.add(who)


def _end(who: object) -> None:
    with _lock:
        _muting.discard(who)
        # What somebody else has set meanwhile stays.
        if not _muting and _LOG.level == _NOTHING:
            _LOG.setLevel(_before)


def _unread() -> bool:
    silent = all(isinstance(handler, logging.NullHandler) for handler in _LOG.handlers)
    return silent and not _LOG.propagate and not _LOG.filters


def _forget_after_fork() -> None:
    """The child may never come back to where it was forked."""
    global _lock  # noqa: PLW0603
    _lock = threading.RLock()
    _muting.clear()
    _end(None)


os.register_at_fork(after_in_child=_forget_after_fork)
