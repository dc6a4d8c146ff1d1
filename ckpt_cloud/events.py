"""What happens during a save or a load, as events and as a report at the end."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

log = logging.getLogger(__name__)

Direction = Literal["up", "down"]


@dataclass(frozen=True, slots=True)
class BytesMoved:
    """A part was staged for upload, or a range has been asked for."""

    direction: Direction
    key: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class PartEnded:
    """A part is stored, or a range has arrived; all of them together are what a save or load moves.

    Attributes:
        key: of the object, relative to the checkpoint.
        began_unix_s, ended_unix_s: when it was under way, in seconds since 1970 by this machine's clock.
        rank: whose it was.
    """

    direction: Direction
    key: str
    size_bytes: int
    began_unix_s: float
    ended_unix_s: float
    rank: int = 0


@dataclass(frozen=True, slots=True)
class PhaseBegan:
    """A phase of a save or a load begins.

    Attributes:
        total_bytes: that it will move on this rank; 0 where it moves none.
    """

    name: str
    direction: Direction
    total_bytes: int
    rank: int = 0


@dataclass(frozen=True, slots=True)
class PhaseResized:
    """What a phase will move is known better: with compression only once everything is compressed.

    Attributes:
        total_bytes: in place of those of `PhaseBegan`; the last one is exact.
    """

    name: str
    total_bytes: int
    rank: int = 0


@dataclass(frozen=True, slots=True)
class PhaseEnded:
    """A phase of a save or a load is over.

    Attributes:
        began_unix_s: in seconds since 1970 by this machine's clock.
        rank: whose it was.
    """

    name: str
    seconds: float
    began_unix_s: float = 0.0
    rank: int = 0


Event = BytesMoved | PartEnded | PhaseBegan | PhaseResized | PhaseEnded
Listener = Callable[[Event], None]


@dataclass(slots=True)
class Report:
    """Figures of one save or load on this rank.

    Attributes:
        bytes_needed: bytes of tensors and items that were asked for; those inline in the manifest do not count.
        bytes_moved: bytes that went over the line for them, headers, block edges and gaps included.
        requests: data requests (puts of objects or parts, ranged reads).
        retries: requests that were sent once more, those about the commit included.
        objects: objects written or read from.
        seconds: wall seconds from the first hook to the last.
        blocked_s: seconds that the caller waited: all of them for a save or load, those of staging and of waiting for
            an earlier save for one in the background.
        verified: False for a load that was told not to check what came.
        phases: seconds of each phase by name.
    """

    bytes_needed: int = 0
    bytes_moved: int = 0
    requests: int = 0
    retries: int = 0
    objects: int = 0
    seconds: float = 0.0
    blocked_s: float = 0.0
    verified: bool = True
    phases: dict[str, float] = field(default_factory=dict)

    @property
    def bytes_written(self) -> int:
        """Same as `bytes_moved`, for a save."""
        return self.bytes_moved

    @property
    def amplification(self) -> float:
        """Bytes moved ÷ bytes needed; 1.0 when nothing was needed."""
        return self.bytes_moved / self.bytes_needed if self.bytes_needed else 1.0

    @property
    def bytes_per_s(self) -> float:
        """Bytes moved ÷ seconds; 0.0 before anything was."""
        return self.bytes_moved / self.seconds if self.seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        """All figures by name, the derived ones too, for metrics systems and JSON."""
        derived = {"amplification": self.amplification, "bytes_per_s": self.bytes_per_s}
        return dataclasses.asdict(self) | derived

    def __str__(self) -> str:
        phases = ", ".join(f"{name} {seconds:.2f}" for name, seconds in self.phases.items())
        return (
            f"{self.bytes_moved / (1 << 20):.1f} MiB in {self.seconds:.2f} s ({phases}), "
            f"{self.bytes_per_s / (1 << 20):.1f} MiB/s, {self.requests} requests, {self.retries} retries, "
            f"{self.objects} objects, amplification {self.amplification:.2f}, blocked {self.blocked_s:.2f} s"
            f"{'' if self.verified else ', NOT VERIFIED'}"
        )


class Recorder:
    """Collects a `Report` and passes events on to a listener, if there is one."""

    def __init__(self, listener: Listener | None = None, *, rank: int = 0) -> None:
        # Both change as the save or load runs; nothing else does. Of parts, the bytes by key are known.
        self.report = Report()
        self._sent: dict[str, int] = {}
        self._began = time.perf_counter()
        self._listener = listener
        self._rank = rank

    @property
    def watched(self) -> bool:
        """Whether anybody listens to single parts."""
        return self._listener is not None

    def moved(self, direction: Direction, key: str, size_bytes: int) -> None:
        """Counts one data request."""
        self.report.bytes_moved += size_bytes
        self.report.requests += 1
        self._tell(BytesMoved(direction, key, size_bytes))

    def ended(self, direction: Direction, key: str, size_bytes: int, began_unix_s: float) -> None:
        """A part or a range that was under way since `began_unix_s` is done."""
        if self._listener:
            self._sent[key] = self._sent.get(key, 0) + size_bytes
            self._tell(PartEnded(direction, key, size_bytes, began_unix_s, time.time(), self._rank))

    def stored(self, key: str, size_bytes: int, began_unix_s: float) -> None:
        """An object is stored: what of it was not told part by part, is now."""
        rest = size_bytes - self._sent.pop(key, 0)
        if rest > 0:
            self.ended("up", key, rest, began_unix_s)
            self._sent.pop(key, None)

    @contextmanager
    def phase(self, name: str, direction: Direction = "up", total_bytes: int = 0) -> Iterator[None]:
        """Times what is done inside; retries meanwhile are counted here."""
        began, began_unix_s = time.perf_counter(), time.time()
        token = _current.set(self)
        self.expect(name, direction, total_bytes)
        try:
            yield
        finally:
            _current.reset(token)
            now = time.perf_counter()
            self.report.phases[name] = self.report.phases.get(name, 0.0) + now - began
            self.report.seconds = now - self._began
            self._tell(PhaseEnded(name, now - began, began_unix_s, self._rank))

    def expect(self, name: str, direction: Direction, total_bytes: int) -> None:
        """Tells how many bytes the phase will move, once that is known."""
        if total_bytes:
            self._tell(PhaseBegan(name, direction, total_bytes, self._rank))

    def resize(self, name: str, total_bytes: int) -> None:
        """Tells how many bytes the phase will move, as it is known by now."""
        self._tell(PhaseResized(name, total_bytes, self._rank))

    def _tell(self, event: Event) -> None:
        """A listener that fails is told no more: a save that was committed must not end as one that failed."""
        listener = self._listener
        if listener is None:
            return
        try:
            listener(event)
        except Exception:
            self._listener = None
            log.exception("on_event failed and is called no more; the save or load goes on")


_current: ContextVar[Recorder | None] = ContextVar("ckpt_cloud_recorder", default=None)
"""Of the save or load that is under way; tasks on the private loop inherit it from the call that began them."""


def current() -> Recorder | None:
    """The recorder of the save or load for which this code runs."""
    return _current.get()


def count_retry() -> None:
    """A request is about to be sent once more."""
    recorder = _current.get()
    if recorder is not None:
        recorder.report.retries += 1


def fan_out(*listeners: Listener | None) -> Listener | None:
    """One listener that tells all of `listeners`; None when there is none."""
    present = [listener for listener in listeners if listener is not None]
    if len(present) < 2:
        return present[0] if present else None

    def tell(event: Event) -> None:
        for listener in present:
            listener(event)

    return tell
