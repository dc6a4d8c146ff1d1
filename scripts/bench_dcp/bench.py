"""Runs tasks in processes of their own over a line, peers in turn, and keeps what they say."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from bench_dcp import line as lines
from bench_dcp.line import Line, Name
from bench_dcp.runs import GIB, Figures, Run, Runs

_TIMEOUT_S = 900.0
_RESERVE_GIB = 3.0
_SHARED_MEMORY = Path("/dev/shm")
console = Console(stderr=True)


@dataclass(frozen=True, slots=True)
class Job:
    """One thing to measure: who, by which task with which arguments, over which line."""

    who: str
    task: str
    line: Name
    arguments: Mapping[str, Any]


@dataclass(slots=True)
class Bench:
    """One call of scripts/bench."""

    line: Line
    rounds: int
    gib: float
    peers: Sequence[str]
    runs: Runs = field(default_factory=Runs)
    skipped: list[str] = field(default_factory=list)
    stored: set[str] = field(default_factory=set)
    """URLs that are already there to be loaded."""
    profiles: dict[str, Any] = field(default_factory=dict)

    def in_turn(self, suite: str, case: str, jobs: Sequence[Job], *, rounds: int | None = None) -> None:
        """Everyone once a round, so that a slow minute of the machine hits all alike; each round begins with another.

        Args:
            rounds: fewer than asked for, where more would add nothing.
        """
        failed: set[str] = set()
        rounds = rounds or self.rounds
        for number in range(rounds):
            first = number * len(jobs) // rounds
            for job in (*jobs[first:], *jobs[:first]):
                if job.who in failed:
                    continue
                try:
                    self.runs.add(Run(suite, case, job.who, number, self.run(job, number)))
                except subprocess.SubprocessError as error:
                    failed.add(job.who)
                    self.skip(f"{case}: {job.who} failed: {reason(error)}")

    def run(self, job: Job, number: int = 0) -> Figures:
        """One job in a fresh process; `{round}` in its arguments is replaced."""
        arguments = {
            k: v.replace("{round}", str(number)) if isinstance(v, str) else v for k, v in job.arguments.items()
        }
        figures: Figures = in_process(job.task, arguments, self.line.env(job.line))
        shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
        console.print(
            f"[dim]{job.task} {job.who} {' '.join(map(str, arguments.values()))}: {shown}[/dim]", soft_wrap=True
        )
        return figures

    def store(self, url: str, job: Job) -> str:
        """Has `job` write `url`, once, for others to load; returns `url`."""
        if url not in self.stored:
            self.run(job)
            self.stored.add(url)
        return url

    def skip(self, why: str) -> None:
        """Notes what was not measured."""
        self.skipped.append(why)
        console.print(f"[yellow]skipped: {why}[/yellow]", soft_wrap=True)


def in_process(task: str, arguments: Mapping[str, Any], env: Mapping[str, str]) -> dict[str, Any]:
    """What a task returns in a fresh process that talks to the store that `env` names."""
    command = [sys.executable, "-m", "bench_dcp.child", task, json.dumps(arguments)]
    done = subprocess.run(
        command,
        env={**_clean_environment(), **env},
        capture_output=True,
        check=True,
        text=True,
        timeout=_TIMEOUT_S,
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@contextlib.contextmanager
def start_line(*, stored_gib: float, state_gib: float) -> Iterator[Line]:
    """A line whose server keeps `stored_gib` in memory if that leaves enough for the clients, else on disk."""
    needed = stored_gib + 2 * state_gib + _RESERVE_GIB
    if available_gib() > needed and shutil.disk_usage(_SHARED_MEMORY).free > stored_gib * GIB:
        with lines.start() as line:
            yield line
        return
    console.print(f"[yellow]under {needed:.0f} GiB of memory are free: the server keeps its data on disk[/yellow]")
    with tempfile.TemporaryDirectory(prefix="bench-") as directory, lines.start(Path(directory)) as line:
        yield line


def available_gib() -> float:
    """Memory that programs can have without swapping."""
    for text in Path("/proc/meminfo").read_text().splitlines():
        if text.startswith("MemAvailable:"):
            return int(text.split()[1]) * 1024 / GIB
    return 0.0


def _clean_environment() -> dict[str, str]:
    """Nobody's cloud, and one thread for arithmetic: copies are what is measured."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    return {"OMP_NUM_THREADS": "1", **kept}


def reason(error: subprocess.SubprocessError) -> str:
    """The last things that a failed process said."""
    if isinstance(error, subprocess.CalledProcessError):
        last = [text.strip() for text in (error.stderr or "").splitlines() if text.strip()][-2:]
        return f"exit status {error.returncode}: {' '.join(last)[:400]}"
    return str(error)
