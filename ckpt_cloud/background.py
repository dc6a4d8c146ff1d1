"""One asynchronous save at a time in this process: two would double the memory that copies of the state take."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future, wait
from typing import Any

from ckpt_cloud.errors import InvalidOption, SaveInFlight

# The only state of this module: who begins a save holds the lock, and which was begun last.
_beginning = threading.Lock()
_latest: Future[Any] | None = None


@contextlib.contextmanager
def turn(in_flight: str) -> Iterator[None]:
    """A save may begin within: the one that is under way, if there is one, is over; its outcome is for its caller.

    Raises:
        InvalidOption: `in_flight` is neither "wait" nor "refuse".
        SaveInFlight: an earlier save is not over, and this one may not wait.
    """
    if in_flight not in ("wait", "refuse"):
        raise InvalidOption(f"in_flight is {in_flight!r}; it is 'wait' or 'refuse'")
    lock, waits = _beginning, in_flight == "wait"
    if not lock.acquire(blocking=waits):
        raise _refused()
    try:
        if _latest is not None and not _latest.done():
            if not waits:
                raise _refused()
            wait([_latest])
        yield
    finally:
        lock.release()


def begun(save: Future[Any]) -> None:
    """`save` is under way now; only within one's turn."""
    global _latest  # noqa: PLW0603 - of the process
    _latest = save


def _refused() -> SaveInFlight:
    return SaveInFlight("an earlier save is still under way", hint="wait for its result(), or skip this one")


def _forget_after_fork() -> None:
    """The child has no thread that would end what its parent began."""
    global _beginning, _latest
    _beginning, _latest = threading.Lock(), None


os.register_at_fork(after_in_child=_forget_after_fork)
