"""`scripts/bench`: saves and loads beside its peers, round by round, and prints ratios and targets."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from bench_dcp import machine, plot, report
from bench_dcp.backends import BACKENDS, PEERS
from bench_dcp.bench import Bench, reason, start_line
from bench_dcp.suites import STORING, SUITES


def main() -> None:
    """Parses the command line, measures, reports."""
    args = _arguments()
    if args.markdown:
        print(report.markdown(report.Result.read(args.markdown)), end="")
        return
    # As Ctrl-C does: servers are stopped, and what was measured so far is reported.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    began = machine.describe()
    names = args.suites or list(SUITES)
    stored = args.gib * (len(args.peers) + 2) if STORING & set(names) else 1.0
    with start_line(stored_gib=stored, state_gib=args.gib) as line:
        bench = Bench(line, args.rounds, args.gib, args.peers)
        for name in names:
            try:
                SUITES[name](bench)
            except KeyboardInterrupt:
                bench.skip(f"{name}: interrupted")
                break
            except subprocess.SubprocessError as error:
                bench.skip(f"{name}: {reason(error)}")
    settings: dict[str, object] = {"suites": " ".join(names), "rounds": args.rounds, "gib": args.gib}
    result = report.Result(began, settings, bench.skipped, bench.profiles, bench.runs)
    result.write(args.json)
    plot.draw(bench.runs, args.png)
    for table in report.tables(result):
        Console(width=None if sys.stdout.isatty() else 140).print(table)
    print(f"{args.json} has it all (as Markdown: scripts/bench --markdown {args.json}); {args.png} shows the speeds")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)}; all by default")
    parser.add_argument("--rounds", type=int, default=3, help="of everyone in turn (default 3)")
    parser.add_argument("--gib", type=float, default=1.0, help="size of the training state (default 1)")
    parser.add_argument("--peers", default=",".join(PEERS), help="comma-separated (default %(default)s)")
    parser.add_argument("--json", type=Path, default=Path("out/bench/bench.json"), help="default %(default)s")
    parser.add_argument("--png", type=Path, default=Path("out/bench/bench.png"), help="default %(default)s")
    parser.add_argument("--markdown", type=Path, metavar="JSON", help="print an earlier run's tables, measure nothing")
    args = parser.parse_args()
    args.peers = [peer for peer in args.peers.split(",") if peer]
    for given, known in ((args.suites, SUITES), (args.peers, BACKENDS)):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"unknown: {', '.join(unknown)}; known are {', '.join(known)}")
    return args


if __name__ == "__main__":
    main()
