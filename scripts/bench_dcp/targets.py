"""What the project set out to reach, and whether a run did. Pure: runs in, verdicts out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from bench_dcp.backends import OURS, PEERS
from bench_dcp.runs import MIB, Runs, cpu_per_gib, faster, growth_mib, longer_s

BUDGET_MIB = 512
"""`TransferOptions.memory_budget` by default."""
SLACK_MIB = 64


@dataclass(frozen=True, slots=True)
class Verdict:
    """One target: what was measured and what was wanted."""

    number: int
    what: str
    value: float
    sense: Literal["at least", "at most"]
    bound: float
    unit: str = ""

    @property
    def met(self) -> bool:
        """Whether the target was reached."""
        return self.value >= self.bound if self.sense == "at least" else self.value <= self.bound


def judge(runs: Runs) -> list[Verdict]:
    """A verdict on every target that something was measured for."""
    found: list[Verdict] = []
    for number, direction, of_limit, over_connector, over_fsspec, cpu in (
        (1, "save", 0.8, 2.0, 6.0, 0.5),
        (2, "load", 0.85, 2.5, 6.0, 0.9),
    ):
        found += _of_limit(runs, number, direction, of_limit)
        found += _faster(runs, number, direction, "s3torchconnector", over_connector)
        found += _faster(runs, number, direction, "fsspec", over_fsspec)
        value = runs.median(direction, OURS, cpu_per_gib)
        found += _at_most(number, f"{direction}: CPU of the client", value, cpu, "s/GiB")
    for case in ("cloud save", "cloud load"):
        found += _of_limit(runs, 3, case, 0.9)
        found += _faster(runs, 3, case, "fsspec", 5.0)
    for case, extra in (("small save", 0.4), ("small load", 0.35)):
        value = runs.paired(case, OURS, "planning", longer_s)
        found += _at_most(4, f"{case}: beyond DCP's planning", value, extra, "s")
        for peer in PEERS:
            found += _faster(runs, 4, case, peer, 3.0)
    for case, clients in runs.cases().items():
        if case.startswith("memory ") and OURS in clients:
            value = runs.median(case, OURS, growth_mib)
            found += _at_most(5, f"{case}: peak beyond the state", value, BUDGET_MIB + SLACK_MIB, "MiB")
    return [*found, *_later(runs)]


def _later(runs: Runs) -> Iterator[Verdict]:
    """Resharding, async saves and the manifest: one process group or one process, no peers in time."""
    for case in runs.cases():
        if case.startswith("reshard "):
            bound = 1.05 if case.startswith("reshard row") else 1.3
            value = runs.median(case, OURS, lambda f: f["fetched"] / f["needed"])
            yield from _at_most(6, f"{case}: fetched ÷ needed", value, bound, "×")
    rows: tuple[tuple[int, str, str, Callable[[dict[str, float]], float], float, str], ...] = (
        (7, "async", "blocked ÷ one copy", lambda f: f["blocked_s"] / f["copy_s"], 1.2, "×"),
        (
            7,
            "async",
            "second save in flight: peak beyond one copy",
            lambda f: (f["second_peak"] - f["bytes"]) / MIB,
            BUDGET_MIB + SLACK_MIB,
            "MiB",
        ),
        (8, "manifest", "encode", lambda f: f["encode_s"], 2.0, "s"),
        (8, "manifest", "decode", lambda f: f["decode_s"], 2.0, "s"),
        (8, "manifest", "size", lambda f: f["size"] / 1e6, 100.0, "MB"),
        (8, "manifest", "fetched for one tensor", lambda f: f["fetched_for_one"] / 1e6, 2.0, "MB"),
    )
    for number, case, what, value_of, bound, unit in rows:
        yield from _at_most(number, f"{case}: {what}", runs.median(case, OURS, value_of), bound, unit)


def _of_limit(runs: Runs, number: int, case: str, bound: float) -> list[Verdict]:
    limit = runs.limit(case)
    value = runs.paired(case, OURS, limit, faster) if limit else None
    return [] if value is None else [Verdict(number, f"{case}: speed ÷ bare {limit}", value, "at least", bound, "×")]


def _faster(runs: Runs, number: int, case: str, peer: str, bound: float) -> list[Verdict]:
    value = runs.paired(case, OURS, peer, faster)
    return [] if value is None else [Verdict(number, f"{case}: speed ÷ {peer}", value, "at least", bound, "×")]


def _at_most(number: int, what: str, value: float | None, bound: float, unit: str) -> list[Verdict]:
    return [] if value is None else [Verdict(number, what, value, "at most", bound, unit)]
