"""What is measured, suite by suite; each adds its runs to the bench."""

from __future__ import annotations

from collections.abc import Callable

from bench_dcp.backends import OURS
from bench_dcp.bench import Bench, Job
from bench_dcp.line import Name
from bench_dcp.runs import LIMIT
from bench_dcp.states import llama_bytes

_Setting = tuple[int, int]
"""Of bare obstore: MiB of a part or range, requests in flight."""
_UP: tuple[_Setting, ...] = ((8, 16), (16, 8), (16, 16), (32, 8))
_DOWN: tuple[_Setting, ...] = ((8, 8), (16, 4), (16, 8), (32, 4))
_CLOUD: tuple[_Setting, ...] = ((8, 32), (8, 64), (16, 16), (16, 32), (16, 64))


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


SUITES: dict[str, Callable[[Bench], None]] = {"save": save, "load": load, "cloud": cloud, "small": small}


def _everyone(bench: Bench) -> tuple[str, ...]:
    return (OURS, *bench.peers)


def _save(bench: Bench, who: str, state: str, line: Name) -> Job:
    url = f"s3://bench/{line}/{state}/{who}-{{round}}"
    arguments = {"direction": "save", "backend": who, "state": state, "gib": bench.gib, "url": url}
    return Job(who, "transfer", line, arguments)


def _load(bench: Bench, who: str, state: str, line: Name) -> Job:
    """Of what the same backend wrote."""
    url = f"s3://bench/stored/{state}/{who}"
    arguments = {"backend": who, "state": state, "gib": bench.gib, "url": url}
    bench.store(url, Job(who, "transfer", "direct", {"direction": "save", **arguments}))
    return Job(who, "transfer", line, {"direction": "load", **arguments})


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
