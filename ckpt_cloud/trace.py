"""Events of any number of ranks as a trace file that Perfetto and chrome://tracing open.

Every rank is a process of the timeline; its phases are one row, its parts as many rows as were under way at once.
"""

from __future__ import annotations

import heapq
import os
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ckpt_cloud.events import Event, PartEnded, PhaseEnded

Timed = PartEnded | PhaseEnded

_PHASES = 0
_FIRST_LANE = {"up": 1, "down": 10_001}
_SAID = {"up": "upload", "down": "download"}


class Trace:
    """Keeps what has a beginning and an end; give it to a writer or a reader as `on_event`.

    `write` stores what this process saw. `CheckpointManager(trace_dir=...)` does so for all ranks in one file.
    """

    def __init__(self) -> None:
        # Grows under the lock, since events come from several threads.
        self._lock = threading.Lock()
        self._events: list[Timed] = []

    def __call__(self, event: Event) -> None:
        """Takes one event."""
        if isinstance(event, PartEnded | PhaseEnded):
            with self._lock:
                self._events.append(event)

    @property
    def events(self) -> list[Timed]:
        """What was kept, in the order in which it ended."""
        with self._lock:
            return list(self._events)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes the trace file; directories are made."""
        write_trace(path, self.events)


def write_trace(path: str | os.PathLike[str], events: Sequence[Timed]) -> None:
    """Writes the events, of any number of ranks, as one trace file."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(msgspec.json.encode(chrome_trace(events)))


def chrome_trace(events: Sequence[Timed]) -> dict[str, Any]:
    """The events in Chrome's trace format: complete events, in microseconds since the first began."""
    origin = min((_span(event)[0] for event in events), default=0.0)
    rows: list[dict[str, Any]] = []
    for rank in sorted({event.rank for event in events}):
        mine = [event for event in events if event.rank == rank]
        rows += _named(rank, "process_name", 0, f"rank {rank}")
        rows += _named(rank, "thread_name", _PHASES, "phases")
        rows += [_row(event, _PHASES, origin) for event in mine if isinstance(event, PhaseEnded)]
        for direction, first in _FIRST_LANE.items():
            parts = [event for event in mine if isinstance(event, PartEnded) and event.direction == direction]
            placed = lanes(parts)
            rows += [_row(part, first + lane, origin) for part, lane in placed]
            for lane in sorted({lane for _, lane in placed}):
                rows += _named(rank, "thread_name", first + lane, f"{_SAID[direction]} {lane + 1}")
    return {"traceEvents": rows, "displayTimeUnit": "ms", "otherData": {"begins_unix_s": origin}}


def lanes(parts: Iterable[PartEnded]) -> list[tuple[PartEnded, int]]:
    """Each part with the lowest row on which no other part is under way at the time."""
    free: list[int] = []
    busy: list[tuple[float, int]] = []
    placed = []
    for part in sorted(parts, key=lambda part: (part.began_unix_s, part.ended_unix_s)):
        while busy and busy[0][0] <= part.began_unix_s:
            heapq.heappush(free, heapq.heappop(busy)[1])
        lane = heapq.heappop(free) if free else len(busy)
        heapq.heappush(busy, (part.ended_unix_s, lane))
        placed.append((part, lane))
    return placed


def _span(event: Timed) -> tuple[float, float]:
    if isinstance(event, PhaseEnded):
        return event.began_unix_s, event.began_unix_s + event.seconds
    return event.began_unix_s, event.ended_unix_s


def _row(event: Timed, lane: int, origin: float) -> dict[str, Any]:
    began, ended = _span(event)
    row: dict[str, Any] = {"ph": "X", "pid": event.rank, "tid": lane}
    row |= {"ts": round((began - origin) * 1e6), "dur": max(1, round((ended - began) * 1e6))}
    if isinstance(event, PhaseEnded):
        return row | {"name": event.name, "cat": "phase"}
    size = {"key": event.key, "bytes": event.size_bytes}
    return row | {"name": event.key.rpartition("/")[2], "cat": event.direction, "args": size}


def _named(rank: int, what: str, lane: int, name: str) -> list[dict[str, Any]]:
    return [{"ph": "M", "name": what, "pid": rank, "tid": lane, "args": {"name": name}}]
