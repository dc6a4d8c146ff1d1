"""`scripts/bench`: saves and loads one state with each backend in turn, round by round, and prints ratios."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

import localstack
from bench_dcp.backends import BACKENDS
from bench_dcp.states import STATES

SCHEMES = {"seaweedfs": "s3", "azurite": "az", "fake-gcs": "gs"}
"""Local servers that survive a gigabyte."""
Figures = dict[tuple[str, str], list[dict[str, float]]]


def main() -> None:
    """Parses the command line, measures, prints."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("--state", choices=sorted(STATES), default="llama")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--backends", default="ckpt_cloud,fsspec", help="the first is compared with the others")
    parser.add_argument("--server", choices=sorted(SCHEMES), default="seaweedfs", help="the local server to start")
    parser.add_argument("--url", help="an existing s3://bucket/prefix instead of a local server")
    args = parser.parse_args()
    backends = args.backends.split(",")
    if unknown := set(backends) - set(BACKENDS):
        parser.error(f"unknown backends {', '.join(sorted(unknown))}; known are {', '.join(sorted(BACKENDS))}")
    with place(args.url, args.server) as root:
        print_table(measure(root, backends, args.state, args.rounds), backends)


@contextlib.contextmanager
def place(url: str | None, name: str) -> Iterator[str]:
    """Where to save: the given URL, or a bucket on a server of our own."""
    if url is not None:
        yield url.rstrip("/")
        return
    with localstack.start(name) as server:
        server.create_bucket("bench")
        os.environ.update(server.env)
        yield f"{SCHEMES[name]}://bench/run"


def measure(root: str, backends: list[str], state: str, rounds: int) -> Figures:
    """All measurements; backends take turns, so that a slow minute of the machine hits them alike."""
    figures: Figures = {}
    for number in range(rounds):
        for direction in ("save", "load"):
            for backend in backends:
                url = f"{root}/{backend}-{number}"
                figures.setdefault((direction, backend), []).append(one(direction, backend, state, url))
    return figures


def one(direction: str, backend: str, state: str, url: str) -> dict[str, float]:
    """One measurement in a fresh process."""
    command = [sys.executable, "-m", "bench_dcp.measure", direction, backend, state, url]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def print_table(figures: Figures, backends: list[str]) -> None:
    """Medians, and how many times longer each takes than the first backend, round by round."""
    table = Table("", "backend", "wall s", "GiB/s", "CPU s/GiB", "RSS growth MiB", f"wall ÷ {backends[0]}", "CPU ÷")
    for (direction, backend), runs in figures.items():
        gib = runs[0]["bytes"] / (1 << 30)
        ours = figures[direction, backends[0]]
        wall, cpu = (statistics.median(run[name] for run in runs) for name in ("wall_s", "cpu_s"))
        ratios = [
            statistics.median(run[name] / other[name] for run, other in zip(runs, ours, strict=True))
            for name in ("wall_s", "cpu_s")
        ]
        grown = max(run["rss_growth"] for run in runs) / (1 << 20)
        row = (f"{wall:.2f}", f"{gib / wall:.2f}", f"{cpu / gib:.2f}", f"{grown:.0f}", *(f"{r:.2f}" for r in ratios))
        table.add_row(direction, backend, *row)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    main()
