"""A progress bar from events: bytes, rate, time left. Only on rank 0, and only where somebody sees it."""

from __future__ import annotations

import sys
import threading
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from ckpt_cloud.events import Event, Listener, PartEnded, PhaseBegan, PhaseEnded, PhaseResized


def bar(label: str, *, file: TextIO | None = None) -> Listener | None:
    """A listener that shows a bar, or None where there is no terminal.

    Args:
        label: what is shown before the bar.
        file: standard error by default.
    """
    stream = file or sys.stderr
    return ProgressBar(label, stream) if stream is not None and stream.isatty() else None


class ProgressBar:
    """Shows the bytes of each phase that moves some; other ranks than 0 show nothing."""

    def __init__(self, label: str, file: TextIO) -> None:
        self._label = label
        self._file = file
        # All change under the lock, since events come from several threads.
        self._lock = threading.Lock()
        self._shown: Progress | None = None
        self._task = TaskID(0)
        self._phase = ""

    def __call__(self, event: Event) -> None:
        """Takes one event."""
        if isinstance(event, PhaseBegan) and event.rank == 0:
            self._begin(event)
        elif isinstance(event, PhaseResized) and event.name == self._phase:
            self._resize(event.total_bytes)
        elif isinstance(event, PartEnded):
            self._advance(event.size_bytes)
        elif isinstance(event, PhaseEnded) and event.name == self._phase:
            self._end()

    def _begin(self, event: PhaseBegan) -> None:
        with self._lock:
            if self._shown is not None:
                return
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
            )
            self._phase = event.name
            self._shown = Progress(*columns, console=Console(file=self._file), transient=True)
            self._task = self._shown.add_task(self._label, total=event.total_bytes)
            self._shown.start()

    def _resize(self, total_bytes: int) -> None:
        with self._lock:
            if self._shown is not None:
                self._shown.update(self._task, total=total_bytes)

    def _advance(self, size_bytes: int) -> None:
        with self._lock:
            if self._shown is not None:
                task = self._shown.tasks[self._task]
                # Parts of an upload that began again are sent twice.
                left = max(0.0, (task.total or 0) - task.completed)
                self._shown.advance(self._task, min(size_bytes, left))

    def _end(self) -> None:
        with self._lock:
            if self._shown is not None:
                self._shown.stop()
            self._shown, self._phase = None, ""
