"""Where the seconds of one save or load go: phases, CPU by thread, and Python functions by samples."""

from __future__ import annotations

import collections
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from bench_dcp.backends import BACKENDS, OURS, calls
from bench_dcp.meter import Meter
from bench_dcp.states import STATES, size_bytes
from bench_dcp.tasks.transfer import wake_up

_EVERY_S = 0.004
_TOP = 12
_WAITS = ("threading.py", "selectors.py", "queue.py", "concurrent/futures/thread.py")
_TASKS = Path("/proc/self/task")


def run(direction: str, state: str, gib: float, url: str) -> dict[str, Any]:
    """Figures, the reader's or writer's own phases, CPU seconds by thread, and seconds by function."""
    wake_up(direction, OURS, url)
    values = STATES[state](gib)
    writer, reader = BACKENDS[OURS](url)
    sampler = _Sampler()
    with Meter() as meter, sampler:
        if direction == "save":
            calls(OURS).save(values, storage_writer=writer)
        else:
            calls(OURS).load(values, storage_reader=reader)
    report = (writer if direction == "save" else reader).report
    return {
        **meter.figures,
        "bytes": size_bytes(values),
        "phases": report.phases,
        "threads": dict(sampler.cpu_s().most_common()),
        "functions": [(*key, seconds) for key, seconds in sampler.seconds().most_common(_TOP)],
    }


class _Sampler:
    """Looks at all threads every 4 ms; threads of libraries have names but no Python frames."""

    def __init__(self) -> None:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)
        self._seen: collections.Counter[tuple[str, str]] = collections.Counter()
        self._first: dict[str, int] = {}
        self._last: dict[str, int] = {}
        self._names: dict[str, str] = {}
        self._looks = 0

    def __enter__(self) -> None:
        self._look_at_cpu()
        self._first = dict(self._last)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._look_at_cpu()

    def cpu_s(self) -> collections.Counter[str]:
        """CPU seconds by the name of the thread."""
        total: collections.Counter[str] = collections.Counter()
        for task, spent in self._last.items():
            total[self._names[task]] += (spent - self._first.get(task, 0)) / 1e9
        del total["sampler"]
        return total

    def seconds(self) -> collections.Counter[tuple[str, str]]:
        """Wall seconds in which a thread was in a function and not waiting, by thread and function."""
        return collections.Counter({key: count * _EVERY_S for key, count in self._seen.items()})

    def _run(self) -> None:
        while not self._over.wait(_EVERY_S):
            names = {thread.ident: thread.name for thread in threading.enumerate()}
            for ident, frame in sys._current_frames().items():
                name = names.get(ident, "?")
                if name != "sampler" and not frame.f_code.co_filename.endswith(_WAITS):
                    self._seen[_plain(name), _place(frame)] += 1
            self._looks += 1
            if self._looks % 10 == 0:
                self._look_at_cpu()

    def _look_at_cpu(self) -> None:
        python = {str(thread.native_id): _plain(thread.name) for thread in threading.enumerate()}
        for task in _TASKS.iterdir():
            try:
                self._last[task.name] = int((task / "schedstat").read_text().split()[0])
                self._names[task.name] = python.get(task.name) or (task / "comm").read_text().strip()
            except OSError:
                continue  # it has ended


def _plain(name: str) -> str:
    """Without the number that tells the threads of a pool apart."""
    return name.rstrip("0123456789").rstrip("-_ ") or name


def _place(frame: FrameType) -> str:
    path = Path(frame.f_code.co_filename)
    return f"{path.parent.name}/{path.name}:{frame.f_code.co_qualname}"
