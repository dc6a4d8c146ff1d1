"""How long `async_save` keeps the training thread, and what a second one does while the first is under way."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from typing import Any

import torch

from bench_dcp.backends import BACKENDS, calls
from bench_dcp.meter import Meter
from bench_dcp.states import State, llama, size_bytes
from bench_dcp.tasks.transfer import wake_up

_TIMES = 3


def run(backend: str, gib: float, url: str) -> dict[str, float]:
    """Seconds blocked, seconds of one copy, and peaks above the state itself: alone, and with a second in flight.

    Copies and saves take turns, and the best of each counts: most of either is the kernel finding memory for it.
    """
    wake_up("save", backend, url)
    state = llama(gib)
    copies_s, blocks_s, peaks = list[float](), list[float](), list[int]()
    for turn in range(_TIMES):
        copies_s.append(_copy_s(state))
        with Meter() as alone:
            future, blocked_s = _begin(backend, state, f"{url}/alone-{turn}")
            _wait(future)
        blocks_s.append(blocked_s)
        peaks.append(alone.peak_growth)
    with Meter() as together:
        first, _ = _begin(backend, state, f"{url}/1")
        second, second_blocked_s = _begin(backend, state, f"{url}/2")
        _wait(first)
        _wait(second)
    return {
        "bytes": size_bytes(state),
        "copy_s": min(copies_s),
        "blocked_s": min(blocks_s),
        "first_peak": max(peaks),
        "second_blocked_s": second_blocked_s,
        "second_peak": together.peak_growth,
    }


def _copy_s(state: State) -> float:
    """Seconds of one copy into fresh memory, as a save's is: one into memory freed before takes a third."""
    with Meter() as meter:
        copies = [value.clone() for value in state.values() if isinstance(value, torch.Tensor)]
    del copies
    return meter.wall_s


def _begin(backend: str, state: State, url: str) -> tuple[Any, float]:
    """The response, and seconds until it came."""
    writer, _ = BACKENDS[backend](url)
    began = time.perf_counter()
    response = calls(backend).async_save(state, storage_writer=writer, no_dist=True)
    return response, time.perf_counter() - began


def _wait(response: Any) -> None:
    future = response if isinstance(response, Future) else response.upload_completion
    future.result()
    # The thread lets go of the copy only after its future is done; until then it would count as the next one's start.
    for thread in threading.enumerate():
        if thread.name.startswith("AsyncCheckpointExecutor"):
            thread.join()
