"""One measurement in a process of its own: a save or a load, timed from the inside, printed as JSON."""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
import warnings

import torch
from torch.distributed import checkpoint as dcp

from bench_dcp.backends import BACKENDS
from bench_dcp.states import STATES


def main(direction: str, backend: str, state_name: str, url: str) -> None:
    """Runs it once and prints wall and CPU seconds, bytes, and what resident memory grew by."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    state = STATES[state_name]()
    writer, reader = BACKENDS[backend](url)
    before = resource.getrusage(resource.RUSAGE_SELF)
    began = time.perf_counter()
    if direction == "save":
        dcp.save(state, storage_writer=writer)
    else:
        expected = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in state.items()}
        for value in state.values():
            if isinstance(value, torch.Tensor):
                value.zero_()
        before = resource.getrusage(resource.RUSAGE_SELF)
        began = time.perf_counter()
        dcp.load(state, storage_reader=reader)
    wall = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_SELF)
    if direction == "load":
        check(state, expected)
    size = sum(v.numel() * v.element_size() for v in state.values() if isinstance(v, torch.Tensor))
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    grown = (after.ru_maxrss - before.ru_maxrss) * 1024
    print(json.dumps({"wall_s": wall, "cpu_s": cpu, "bytes": size, "rss_growth": grown}))


def check(state: dict[str, object], expected: dict[str, object]) -> None:
    """A fast load of wrong bytes is worth nothing."""
    for name, value in expected.items():
        same = torch.equal(state[name], value) if isinstance(value, torch.Tensor) else state[name] == value
        if not same:
            raise SystemExit(f"{name} came back wrong")


if __name__ == "__main__":
    main(*sys.argv[1:])
