"""What happens during a save or a load, as events and as a report at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True)
class BytesMoved:
    """A part was staged for upload, or a range has arrived."""

    direction: Literal["up", "down"]
    key: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class PhaseEnded:
    """A phase of a save or a load is over."""

    name: str
    seconds: float


Event = BytesMoved | PhaseEnded
Listener = Callable[[Event], None]


@dataclass(slots=True)
class Report:
    """Figures of one save or load on this rank.

    Attributes:
        bytes_needed: bytes of tensors and items that were asked for; those inline in the manifest do not count.
        bytes_moved: bytes that went over the line for them, headers, block edges and gaps included.
        requests: data requests (puts of objects or parts, ranged reads).
        objects: objects written or read from.
        seconds: wall seconds from the first hook to the last.
        phases: seconds of each phase by name.
    """

    bytes_needed: int = 0
    bytes_moved: int = 0
    requests: int = 0
    objects: int = 0
    seconds: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)

    @property
    def bytes_written(self) -> int:
        """Same as `bytes_moved`, for a save."""
        return self.bytes_moved

    @property
    def amplification(self) -> float:
        """Bytes moved ÷ bytes needed; 1.0 when nothing was needed."""
        return self.bytes_moved / self.bytes_needed if self.bytes_needed else 1.0


class Recorder:
    """Collects a `Report` and passes events on to a listener, if there is one."""

    def __init__(self, listener: Listener | None = None) -> None:
        # Both change as the save or load runs; nothing else does.
        self.report = Report()
        self._began = time.perf_counter()
        self._listener = listener

    def moved(self, direction: Literal["up", "down"], key: str, size_bytes: int) -> None:
        """Counts one data request."""
        self.report.bytes_moved += size_bytes
        self.report.requests += 1
        if self._listener:
            self._listener(BytesMoved(direction, key, size_bytes))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times what is done inside."""
        began = time.perf_counter()
        try:
            yield
        finally:
            now = time.perf_counter()
            self.report.phases[name] = self.report.phases.get(name, 0.0) + now - began
            self.report.seconds = now - self._began
            if self._listener:
                self._listener(PhaseEnded(name, now - began))
