"""Measurements as values, and what is asked of them: medians, and ratios taken round by round."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

GIB = 1 << 30
MIB = 1 << 20
LIMIT = "obstore"
"""Names of the bare transport's runs begin with it, then say part size and requests in flight."""

Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Run:
    """One measurement in one process."""

    suite: str
    case: str
    who: str
    round: int
    figures: Figures


class Runs:
    """All measurements of one call of scripts/bench."""

    def __init__(self, runs: Iterable[Run] = ()) -> None:
        self._runs = list(runs)

    def __iter__(self) -> Iterator[Run]:
        return iter(self._runs)

    def add(self, run: Run) -> None:
        """Keeps one more."""
        self._runs.append(run)

    def of(self, case: str, who: str) -> dict[int, Figures]:
        """Figures by round."""
        return {run.round: run.figures for run in self._runs if (run.case, run.who) == (case, who)}

    def cases(self) -> dict[str, list[str]]:
        """Who was measured in each case, in order."""
        found: dict[str, list[str]] = {}
        for run in self._runs:
            clients = found.setdefault(run.case, [])
            if run.who not in clients:
                clients.append(run.who)
        return found

    def median(self, case: str, who: str, value: Callable[[Figures], float]) -> float | None:
        """Of `value` over the rounds; None where nothing was measured."""
        values = [value(figures) for figures in self.of(case, who).values()]
        return statistics.median(values) if values else None

    def paired(self, case: str, who: str, other: str, value: Callable[[Figures, Figures], float]) -> float | None:
        """Median of `value(who's, other's)` over the rounds that both have."""
        ours, theirs = self.of(case, who), self.of(case, other)
        values = [value(ours[number], theirs[number]) for number in ours if number in theirs]
        return statistics.median(values) if values else None

    def limit(self, case: str) -> str | None:
        """The bare transport's fastest setting in a case, by its median."""
        settings = [who for who in self.cases().get(case, []) if who.startswith(LIMIT)]
        return max(settings, key=lambda who: self.median(case, who, speed) or 0.0, default=None)

    def to_json(self) -> list[dict[str, Any]]:
        """Plain values."""
        return [asdict(run) for run in self._runs]

    @classmethod
    def from_json(cls, values: list[dict[str, Any]]) -> Runs:
        """What `to_json` gave."""
        return cls(Run(**value) for value in values)


def speed(figures: Figures) -> float:
    """GiB a second."""
    return figures["bytes"] / GIB / figures["wall_s"]


def cpu_per_gib(figures: Figures) -> float:
    """CPU seconds of the client process for one GiB."""
    return figures["cpu_s"] / (figures["bytes"] / GIB)


def growth_mib(figures: Figures) -> float:
    """Peak resident memory above where it stood at the start."""
    return figures["peak_growth"] / MIB


def faster(ours: Figures, theirs: Figures) -> float:
    """How many times as fast ours is."""
    return speed(ours) / speed(theirs)


def longer_s(ours: Figures, theirs: Figures) -> float:
    """Wall seconds beyond theirs."""
    return ours["wall_s"] - theirs["wall_s"]
