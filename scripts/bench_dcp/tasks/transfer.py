"""One `save` or `load` of a state through a backend, after a tiny one that wakes up imports and connections."""

from __future__ import annotations

import os

from bench_dcp.backends import BACKENDS, calls
from bench_dcp.meter import Meter
from bench_dcp.states import STATES, digest, size_bytes, wipe


def run(direction: str, backend: str, state: str, gib: float, url: str) -> dict[str, float]:
    """Figures of the save or load; a load is checked."""
    wake_up(direction, backend, url)
    values = STATES[state](gib)
    writer, reader = BACKENDS[backend](url)
    meter = Meter()
    if direction == "save":
        with meter:
            calls(backend).save(values, storage_writer=writer)
    else:
        expected = digest(values)
        wipe(values)
        with meter:
            calls(backend).load(values, storage_reader=reader)
        wrong = [name for name, value in digest(values).items() if value != expected[name]]
        if wrong:
            raise SystemExit(f"{backend} loaded wrong values: {', '.join(wrong[:5])}")
    return {**meter.figures, "bytes": size_bytes(values)}


def wake_up(direction: str, backend: str, url: str) -> None:
    """A training job saves many times, so what only the first save costs is left out, for all alike."""
    writer, reader = BACKENDS[backend](f"{url}-tiny-{os.getpid()}")
    state = STATES["tiny"]()
    calls(backend).save(state, storage_writer=writer)
    if direction == "load":
        calls(backend).load(state, storage_reader=reader)
