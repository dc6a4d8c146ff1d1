"""What is measured, suite by suite; each adds its runs to the bench."""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path

from bench_dcp import line as lines
from bench_dcp.backends import OURS
from bench_dcp.bench import Bench, Job, available_gib, in_process
from bench_dcp.line import Name
from bench_dcp.runs import LIMIT, Run
from bench_dcp.states import llama_bytes

_Setting = tuple[int, int]
"""Of bare obstore: MiB of a part or range, requests in flight."""
_UP: tuple[_Setting, ...] = ((6, 32), (8, 16), (8, 32), (16, 8), (16, 16))
_DOWN: tuple[_Setting, ...] = ((8, 8), (16, 4), (16, 8), (32, 4))
_CLOUD: tuple[_Setting, ...] = ((5, 64), (8, 32), (8, 64), (8, 128), (16, 32), (16, 64))

_LARGE = 8
"""Times the size that memory is measured with as well."""
_ROOM_GIB = 4.0
"""Memory to be free beyond the state itself."""

_numbers = itertools.count()


def save(bench: Bench) -> None:
    """The training state into the sink: what the client alone can do."""
    jobs = [_save(bench, who, "llama", "sink") for who in _everyone(bench)]
    bench.in_turn("save", "save", jobs + _bare(bench, "up", "sink", _UP))


def load(bench: Bench) -> None:
    """The training state from a real server."""
    jobs = [_load(bench, who, "llama", "direct") for who in _everyone(bench)]
    bench.in_turn("load", "load", jobs + _bare(bench, "down", "direct", _DOWN))


def cloud(bench: Bench) -> None:
    """Both again, with a cloud's time to first byte and bytes per connection."""
    jobs = [_save(bench, who, "llama", "sink_cloud") for who in _everyone(bench)]
    bench.in_turn("cloud", "cloud save", jobs + _bare(bench, "up", "sink_cloud", _CLOUD))
    jobs = [_load(bench, who, "llama", "cloud") for who in _everyone(bench)]
    bench.in_turn("cloud", "cloud load", jobs + _bare(bench, "down", "cloud", _CLOUD))


def small(bench: Bench) -> None:
    """20,000 small tensors and 2,000 scalars, to and from a real server, beside DCP's planning alone."""
    for direction, job in (("save", _save), ("load", _load)):
        jobs = [job(bench, who, "small", "direct") for who in _everyone(bench)]
        nothing = {"direction": direction, "state": "small", "gib": 0}
        bench.in_turn("small", f"small {direction}", [*jobs, Job("planning", "planning", "direct", nothing)])


def memory(bench: Bench) -> None:
    """Peak memory beyond the state, for a small and a large one.

    `strided` ones have to be copied on their way; a line that is slower than copying lets copies fill the budget.
    """
    for gib in (bench.gib, _LARGE * bench.gib):
        if available_gib() < gib + _ROOM_GIB:
            bench.skip(f"memory {gib:g} GiB: under {gib + _ROOM_GIB:.0f} GiB of memory are free")
            continue
        sized = dataclasses.replace(bench, gib=gib)
        lines_by_state: tuple[tuple[str, Name], ...] = (("llama", "sink"), ("strided", "sink_cloud"))
        for state, name in lines_by_state:
            case = f"memory save {gib:g} GiB {state}"
            bench.in_turn("memory", case, [_save(sized, OURS, state, name)], rounds=1)
        # The server's copy of the large one is better kept on disk.
        with tempfile.TemporaryDirectory(prefix="bench-") as directory, lines.start(Path(directory)) as line:
            on_disk = dataclasses.replace(sized, line=line, stored=set())
            for state, _ in lines_by_state:
                job = _load(on_disk, OURS, state, "direct")
                on_disk.in_turn("memory", f"memory load {gib:g} GiB {state}", [job], rounds=1)


def reshard(bench: Bench) -> None:
    """Bytes fetched by 3 and by 8 ranks of what 4 have saved, row-wise, column-wise and both."""
    backends = [OURS, *(peer for peer in bench.peers if peer != "multi_storage_client")]
    same = {"backends": backends, "root": "s3://bench/reshard", "counter_url": bench.line.counter_url}
    env = bench.line.env("counted")
    in_process("reshard", {"direction": "save", "world": 4, **same}, env)
    for world in (3, 8):
        found = in_process("reshard", {"direction": "load", "world": world, **same}, env)
        for kind, by_backend in found.items():
            for who, figures in by_backend.items():
                bench.runs.add(Run("reshard", f"reshard {kind} 4 → {world}", who, 0, figures))


def async_save(bench: Bench) -> None:
    """What the training thread pays; uploads take the cloud's line, so that they last."""
    jobs = []
    for who in (OURS, *(peer for peer in bench.peers if peer == "fsspec")):
        arguments = {"backend": who, "gib": bench.gib, "url": f"s3://bench/async/{who}-{{round}}"}
        jobs.append(Job(who, "async_save", "sink_cloud", arguments))
    bench.in_turn("async", "async", jobs)


def manifest(bench: Bench) -> None:
    """A million chunks."""
    bench.in_turn("manifest", "manifest", [Job(OURS, "manifest", "counted", {})])


def profile(bench: Bench) -> None:
    """Where a second of saving and of loading goes."""
    _load(bench, OURS, "llama", "direct")
    for direction, line, url in (("save", "sink", "s3://bench/profile"), ("load", "direct", _stored("llama", OURS))):
        arguments = {"direction": direction, "state": "llama", "gib": bench.gib, "url": url}
        bench.profiles[direction] = in_process("profile", arguments, bench.line.env(line))


SUITES: dict[str, Callable[[Bench], None]] = {
    "save": save,
    "load": load,
    "cloud": cloud,
    "small": small,
    "memory": memory,
    "reshard": reshard,
    "async": async_save,
    "manifest": manifest,
    "profile": profile,
}
STORING = frozenset({"load", "cloud"})
"""Suites that need room for every backend's checkpoint."""


def _everyone(bench: Bench) -> tuple[str, ...]:
    return (OURS, *bench.peers)


def _save(bench: Bench, who: str, state: str, line: Name) -> Job:
    """To a URL of its own, since a checkpoint is not saved over."""
    url = f"s3://bench/{line}/{next(_numbers)}/{who}-{{round}}"
    arguments = {"direction": "save", "backend": who, "state": state, "gib": bench.gib, "url": url}
    return Job(who, "transfer", line, arguments)


def _load(bench: Bench, who: str, state: str, line: Name) -> Job:
    """Of what the same backend wrote."""
    url = _stored(state, who)
    arguments = {"backend": who, "state": state, "gib": bench.gib, "url": url}
    bench.store(url, Job(who, "transfer", "direct", {"direction": "save", **arguments}))
    return Job(who, "transfer", line, {"direction": "load", **arguments})


def _stored(state: str, who: str) -> str:
    return f"s3://bench/stored/{state}/{who}"


def _bare(bench: Bench, direction: str, line: Name, settings: tuple[_Setting, ...]) -> list[Job]:
    size = llama_bytes(bench.gib)
    prefix = f"bare-{line}" if direction == "up" else "bare-stored"
    same = {"prefix": prefix, "size": size, "objects": 8}
    if direction == "down":
        up = {"direction": "up", **same, "part_mib": 16, "in_flight": 8}
        bench.store(f"s3://bench/{prefix}", Job(LIMIT, "bare", "direct", up))
    return [
        Job(
            f"{LIMIT} {part} MiB × {in_flight}",
            "bare",
            line,
            {"direction": direction, **same, "part_mib": part, "in_flight": in_flight},
        )
        for part, in_flight in settings
    ]
