"""Where the seconds of one save or load go: phases, CPU by thread, and by Python function."""

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

_EVERY_S = 0.01
_TOP = 12
_TASKS = Path("/proc/self/task")
_IDLE = "ckpt_cloud/workers.py:_Threads._work"


def run(direction: str, state: str, gib: float, url: str) -> dict[str, Any]:
    """Figures, the reader's or writer's own phases, CPU seconds by thread and by function."""
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
        # Without that of looking.
        "cpu_s": sum(seconds for _, seconds in sampler.threads()),
        "bytes": size_bytes(values),
        "phases": report.phases,
        "threads": sampler.threads(),
        "functions": sampler.functions(),
    }


class _Sampler:
    """Asks the kernel now and again what each thread has used, and charges it to the function it is in.

    What a worker used that waits for its next task again is not charged to any. Threads of libraries have names, but no
    Python functions.
    """

    def __init__(self) -> None:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)
        self._used: dict[str, int] = {}
        """Nanoseconds by task, at the last look."""
        self._by_thread: collections.Counter[str] = collections.Counter()
        self._by_function: collections.Counter[tuple[str, str]] = collections.Counter()

    def __enter__(self) -> None:
        self._look()
        self._by_thread.clear()
        self._by_function.clear()
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._look()

    def threads(self) -> list[tuple[str, float]]:
        """CPU seconds by the name of the thread, most first."""
        return [(name, spent / 1e9) for name, spent in self._by_thread.most_common()]

    def functions(self) -> list[tuple[str, str, float]]:
        """CPU seconds by thread and Python function, with what they call in other languages, most first."""
        return [(*key, spent / 1e9) for key, spent in self._by_function.most_common(_TOP)]

    def _run(self) -> None:
        while not self._over.wait(_EVERY_S):
            self._look()

    def _look(self) -> None:
        frames = sys._current_frames()
        threads = {str(thread.native_id): thread for thread in threading.enumerate()}
        for task in _TASKS.iterdir():
            try:
                used = int((task / "schedstat").read_text().split()[0])
                thread = threads.get(task.name)
                name = _plain(thread.name if thread else (task / "comm").read_text().strip())
            except OSError:
                continue  # it has ended
            spent = used - self._used.get(task.name, 0)
            self._used[task.name] = used
            if spent and name != "sampler":
                self._by_thread[name] += spent
                if thread and (frame := frames.get(thread.ident or 0)) and (place := _place(frame)) != _IDLE:
                    self._by_function[name, place] += spent


def _plain(name: str) -> str:
    """Without the number that tells the threads of a pool apart."""
    return name.rstrip("0123456789").rstrip("-_ ") or name


def _place(frame: FrameType) -> str:
    path = Path(frame.f_code.co_filename)
    return f"{path.parent.name}/{path.name}:{frame.f_code.co_qualname}"
