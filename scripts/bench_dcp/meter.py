"""What one piece of work costs this process: wall and CPU seconds, and how far resident memory rose above its start."""

from __future__ import annotations

import ctypes
import gc
import resource
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_SAMPLE_S = 0.005


class Meter:
    """Measures the block that it surrounds.

    The peak is the kernel's own high-water mark, reset at the start: `ru_maxrss` never falls, so it would hide all
    growth below an earlier peak. Where the mark cannot be reset, memory is sampled instead.
    """

    wall_s = cpu_s = 0.0
    peak_growth = 0

    def __enter__(self) -> Self:
        gc.collect()
        _give_back_freed_memory()
        self._resettable = _reset_peak()
        self._sampler = None if self._resettable else _Sampler()
        self._rss = _status("VmRSS")
        self._cpu, self._began = _cpu_s(), time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.wall_s, self.cpu_s = time.perf_counter() - self._began, _cpu_s() - self._cpu
        peak = self._sampler.stop() if self._sampler else _status("VmHWM")
        self.peak_growth = max(0, peak - self._rss)

    @property
    def figures(self) -> dict[str, float]:
        """As they go into a run."""
        return {"wall_s": self.wall_s, "cpu_s": self.cpu_s, "peak_growth": self.peak_growth}


class _Sampler:
    def __init__(self) -> None:
        self._peak, self._over = 0, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(_SAMPLE_S):
            self._peak = max(self._peak, _status("VmRSS"))

    def stop(self) -> int:
        self._over.set()
        self._thread.join()
        return self._peak


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _status(field: str) -> int:
    """Bytes that /proc/self/status says of `field`."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"this kernel does not say {field} in {_STATUS}: scripts/bench runs on Linux")


def _reset_peak() -> bool:
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def _give_back_freed_memory() -> None:
    """What the allocator keeps for later would be growth that nobody sees."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
