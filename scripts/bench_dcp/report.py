"""A result as JSON, as tables for a terminal, and as Markdown for docs/performance.md."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from bench_dcp.backends import OURS
from bench_dcp.runs import GIB, Figures, Runs, cpu_per_gib, faster, growth_mib, speed
from bench_dcp.targets import Verdict, judge

Row = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Result:
    """One call of scripts/bench; tables, plots and targets can be made again from its file."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    skipped: list[str]
    profiles: dict[str, Any]
    runs: Runs

    def write(self, path: Path) -> None:
        """As JSON, with the verdicts that follow from it."""
        targets = [{**asdict(verdict), "met": verdict.met} for verdict in judge(self.runs)]
        value = {
            "machine": self.machine,
            "settings": self.settings,
            "skipped": self.skipped,
            "targets": targets,
            "profiles": self.profiles,
            "runs": self.runs.to_json(),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Result:
        """What `write` wrote."""
        value = json.loads(path.read_text())
        rest = (value[name] for name in ("machine", "settings", "skipped", "profiles"))
        return cls(*rest, Runs.from_json(value["runs"]))


SPEED_HEAD = ("", "who", "wall s", "GiB/s", "CPU s/GiB", "peak growth MiB", f"{OURS} is faster")


def speed_rows(runs: Runs) -> Iterator[Row]:
    """Medians by case and backend, the bare transport with its fastest setting only."""
    for case, clients in runs.cases().items():
        limit = runs.limit(case)
        for who in clients:
            if who == limit or not who.startswith("obstore"):
                yield from _speed_row(runs, case, who)


def _speed_row(runs: Runs, case: str, who: str) -> Iterator[Row]:
    figures = runs.of(case, who)
    if not all("wall_s" in f for f in figures.values()):
        return
    ratio = "" if who == OURS else _text(runs.paired(case, OURS, who, faster), "{:.2f}×")
    columns: tuple[tuple[Callable[[Figures], float], str], ...] = (
        (lambda f: f["wall_s"], "{:.2f}"),
        (speed, "{:.2f}"),
        (cpu_per_gib, "{:.2f}"),
        (growth_mib, "{:.0f}"),
    )
    yield (case, who, *(_text(runs.median(case, who, value), form) for value, form in columns), ratio)


RESHARD_HEAD = ("", "who", "needed MiB", "fetched MiB", "fetched ÷ needed", "requests")


def reshard_rows(runs: Runs) -> Iterator[Row]:
    """Bytes that resharding loads fetched."""
    for case, clients in runs.cases().items():
        if case.startswith("reshard "):
            for who in clients:
                columns: tuple[tuple[Callable[[Figures], float], str], ...] = (
                    (lambda f: f["needed"] / (1 << 20), "{:.1f}"),
                    (lambda f: f["fetched"] / (1 << 20), "{:.1f}"),
                    (lambda f: f["fetched"] / f["needed"], "{:.2f}"),
                    (lambda f: f["requests"], "{:.0f}"),
                )
                yield (case, who, *(_text(runs.median(case, who, value), form) for value, form in columns))


TARGET_HEAD = ("target", "what", "measured", "wanted", "")


def target_rows(verdicts: list[Verdict]) -> Iterator[Row]:
    """Each target with what was reached."""
    for v in verdicts:
        unit = v.unit if v.unit in ("", "×") else f" {v.unit}"
        wanted = f"{v.sense} {_number(v.bound)}{unit}"
        yield (str(v.number), v.what, f"{_number(v.value)}{unit}", wanted, "pass" if v.met else "MISS")


ASYNC_HEAD = ("", "who", "one copy s", "blocked s", "blocked ÷ copy", "peak GiB", "second save", "peak of both GiB")


def async_rows(runs: Runs) -> Iterator[Row]:
    """What an asynchronous save costs the training thread, and memory above the state."""
    for who in runs.cases().get("async", []):
        columns: tuple[tuple[Callable[[Figures], float], str], ...] = (
            (lambda f: f["copy_s"], "{:.2f}"),
            (lambda f: f["blocked_s"], "{:.2f}"),
            (lambda f: f["blocked_s"] / f["copy_s"], "{:.2f}"),
            (lambda f: f["first_peak"] / GIB, "{:.2f}"),
        )
        second = _text(runs.median("async", who, lambda f: f["second_blocked_s"]), "{:.2f} s")
        peak = _text(runs.median("async", who, lambda f: f["second_peak"] / GIB), "{:.2f}")
        yield ("async", who, *(_text(runs.median("async", who, value), form) for value, form in columns), second, peak)


PROFILE_HEAD = ("", "where", "what", "s", "share")
_LEAST_SHARE = 0.01


def profile_rows(profiles: dict[str, Any]) -> Iterator[Row]:
    """Phases as a share of the wall time, what threads and functions used as a share of all CPU time."""
    for direction, found in profiles.items():
        wall, cpu = found["wall_s"], found["cpu_s"]
        named = [("phase", name, seconds, wall) for name, seconds in found["phases"].items()]
        named += [("CPU of threads", name, seconds, cpu) for name, seconds in found["threads"]]
        named += [(f"CPU in {thread}", place, seconds, cpu) for thread, place, seconds in found["functions"]]
        yield (direction, "in all", "wall", f"{wall:.2f}", "")
        yield (direction, "in all", "CPU", f"{cpu:.2f}", "")
        for where, what, seconds, whole in named:
            if seconds >= _LEAST_SHARE * whole:
                yield (direction, where, what, f"{seconds:.3f}", f"{seconds / whole:.0%}")


def tables(result: Result) -> Iterator[Table]:
    """For a terminal."""
    for title, head, rows in _sections(result):
        table = Table(*head, title=title, title_justify="left")
        for row in rows:
            style = {"pass": "green", "MISS": "bold red"}.get(row[-1], "bold" if row[1] == OURS else "")
            table.add_row(*row, style=style)
        yield table


def markdown(result: Result) -> str:
    """The same tables, with the machine and the versions."""
    machine = result.machine
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    settings = ", ".join(f"{name} {setting}" for name, setting in result.settings.items())
    computer = f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {machine['system']}"
    load = f"load average {machine['load_average']} before the run"
    parts = [f"{machine['date']}; {computer}, {load}; Python {machine['python']}, {versions}; {settings}."]
    for title, head, rows in _sections(result):
        parts.append(f"**{title}**\n\n" + "\n".join(_line(cells) for cells in (head, ("---",) * len(head), *rows)))
    parts += [f"Not measured: {why}" for why in result.skipped]
    return "\n\n".join(parts) + "\n"


def _sections(result: Result) -> Iterator[tuple[str, Row, list[Row]]]:
    runs = result.runs
    for title, head, rows in (
        ("Speed, processor and memory (medians)", SPEED_HEAD, speed_rows(runs)),
        ("Resharding", RESHARD_HEAD, reshard_rows(runs)),
        ("Asynchronous saves", ASYNC_HEAD, async_rows(runs)),
        ("Where the time goes", PROFILE_HEAD, profile_rows(result.profiles)),
        ("Targets", TARGET_HEAD, target_rows(judge(runs))),
    ):
        if found := list(rows):
            yield title, head, found


def _line(cells: Row) -> str:
    return "| " + " | ".join(cells) + " |"


def _text(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
