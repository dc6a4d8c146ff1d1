"""A result as JSON, as tables for a terminal, and as Markdown for docs/performance.md."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from bench_dcp.backends import OURS
from bench_dcp.runs import Figures, Runs, cpu_per_gib, faster, growth_mib, speed
from bench_dcp.targets import Verdict, judge

Row = tuple[str, ...]


def write_json(
    path: Path, machine: dict[str, object], settings: dict[str, object], skipped: list[str], runs: Runs
) -> None:
    """Everything, so that tables, plots and targets can be made again from it."""
    verdicts = [
        {"number": v.number, "what": v.what, "value": v.value, "sense": v.sense, "bound": v.bound, "met": v.met}
        for v in judge(runs)
    ]
    value = {"machine": machine, "settings": settings, "skipped": skipped, "targets": verdicts, "runs": runs.to_json()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> tuple[dict[str, Any], Runs]:
    """What `write_json` wrote."""
    value = json.loads(path.read_text())
    return value, Runs.from_json(value["runs"])


SPEED_HEAD = ("", "who", "wall s", "GiB/s", "CPU s/GiB", "peak growth MiB", f"{OURS} is faster")


def speed_rows(runs: Runs) -> Iterator[Row]:
    """Medians by case and backend, the bare transport with its fastest setting only."""
    for case, whos in runs.cases().items():
        limit = runs.limit(case)
        for who in whos:
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
    for case, whos in runs.cases().items():
        if case.startswith("reshard "):
            for who in whos:
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


def tables(runs: Runs) -> Iterator[Table]:
    """For a terminal."""
    for title, head, rows in _sections(runs):
        table = Table(*head, title=title, title_justify="left")
        for row in rows:
            style = {"pass": "green", "MISS": "bold red"}.get(row[-1], "bold" if row[1] == OURS else "")
            table.add_row(*row, style=style)
        yield table


def markdown(value: dict[str, Any], runs: Runs) -> str:
    """The same tables, with the machine and the versions."""
    machine = value["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    settings = ", ".join(f"{name} {setting}" for name, setting in value["settings"].items())
    parts = [
        f"{machine['date']}; {machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB, "
        f"{machine['system']}; Python {machine['python']}, {versions}; {settings}.",
    ]
    for title, head, rows in _sections(runs):
        parts.append(f"**{title}**\n\n" + "\n".join(_line(cells) for cells in (head, ("---",) * len(head), *rows)))
    parts += [f"Not measured: {why}" for why in value["skipped"]]
    return "\n\n".join(parts) + "\n"


def _sections(runs: Runs) -> Iterator[tuple[str, Row, list[Row]]]:
    for title, head, rows in (
        ("Speed, processor and memory (medians)", SPEED_HEAD, list(speed_rows(runs))),
        ("Resharding", RESHARD_HEAD, list(reshard_rows(runs))),
        ("Targets", TARGET_HEAD, list(target_rows(judge(runs)))),
    ):
        if rows:
            yield title, head, rows


def _line(cells: Row) -> str:
    return "| " + " | ".join(cells) + " |"


def _text(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
