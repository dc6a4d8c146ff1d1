"""SIGTERM: a note and a deadline. Opt-in; the handlers that were there before come back."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from ckpt_cloud.errors import InvalidOption

_FOR_CLEANING_UP = 0.1
"""Share of the grace period that is left to delete what an aborted save had uploaded."""


class Preemption:
    """Notes a signal and from then on knows how long there is left.

    Args:
        grace_s: seconds between the signal and the end of the process, by whoever sends it.
        time_up: is called from another thread when nine tenths of that are over.
        signals: that mean it.

    Raises:
        InvalidOption: not in the main thread, where alone Python lets handlers be set.
    """

    def __init__(
        self, grace_s: float, time_up: Callable[[], object], signals: tuple[signal.Signals, ...] = (signal.SIGTERM,)
    ) -> None:
        if grace_s <= 0:
            raise InvalidOption(f"a grace period of {grace_s} s; it must be positive")
        if threading.current_thread() is not threading.main_thread():
            raise InvalidOption("signals can only be handled from the main thread", hint="make the manager there")
        self._grace_s = grace_s
        self._time_up = time_up
        # Set once, by the handler.
        self._deadline: float | None = None
        self._timer: threading.Timer | None = None
        self._before: dict[signal.Signals, Any] = {each: signal.signal(each, self._note) for each in signals}

    @property
    def requested(self) -> bool:
        """Whether the signal has come."""
        return self._deadline is not None

    @property
    def left_s(self) -> float | None:
        """Seconds until the end; None before the signal."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    @property
    def is_time_up(self) -> bool:
        """Whether nothing that takes time may begin any more."""
        left = self.left_s
        return left is not None and left <= self._grace_s * _FOR_CLEANING_UP

    def restore(self) -> None:
        """Puts the earlier handlers back, unless somebody has set others meanwhile."""
        for each, before in self._before.items():
            if signal.getsignal(each) == self._note:
                signal.signal(each, before if before is not None else signal.SIG_DFL)
        self._before.clear()
        if self._timer is not None:
            self._timer.cancel()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._deadline is None:
            self._deadline = time.monotonic() + self._grace_s
            self._timer = threading.Timer(self._grace_s * (1 - _FOR_CLEANING_UP), self._time_up)
            self._timer.daemon = True
            self._timer.start()
        before = self._before.get(signal.Signals(number))
        if callable(before) and before is not signal.default_int_handler:
            before(number, frame)
