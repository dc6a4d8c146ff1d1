"""Fuzzes for as long as it is told, in one process: python -m tests.fuzz [--hours H] [--target T] [--seed N]

Prints executions per target at the end; a finding is kept as its seed, which --target T --seed N --runs 1 repeats.
"""

from __future__ import annotations

import argparse
import logging
import random
import resource
import signal
import sys
import time
import traceback
import warnings
from collections import Counter

from tests.fuzz.targets import TARGETS, is_finding, seed

EXTRA_BYTES = 1 << 30
"""More than this above what the process had at the start, and an allocation fails: a finding."""
SECONDS_MAX = 20
"""For one execution; longer is a finding."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--target", choices=sorted(TARGETS), action="append")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--runs", type=int, default=sys.maxsize)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable()
    seed()
    _bound_memory()
    signal.signal(signal.SIGALRM, _too_long)
    names, first = args.target or sorted(TARGETS), random.randrange(1 << 40) if args.seed is None else args.seed
    done, findings = Counter(), Counter()
    ends = time.monotonic() + args.hours * 3600
    for number in range(first, first + args.runs):
        name = names[number % len(names)]
        outcome = _run(name, number)
        done[name] += 1
        if outcome:
            findings[name] += 1
            print(f"FINDING --target {name} --seed {number} --runs 1\n{outcome}", flush=True)
        if time.monotonic() > ends:
            break
    print({name: f"{done[name]} executions, {findings[name]} findings" for name in names})
    return 1 if findings else 0


def _run(name: str, number: int) -> str:
    signal.alarm(SECONDS_MAX)
    try:
        TARGETS[name](random.Random(number))
    except BaseException as error:  # noqa: BLE001 - judged here
        return "".join(traceback.format_exception(error)) if is_finding(error) else ""
    finally:
        signal.alarm(0)
    return ""


def _bound_memory() -> None:
    with open("/proc/self/statm") as status:  # noqa: PTH123 - Linux
        used = int(status.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + EXTRA_BYTES, resource.RLIM_INFINITY))


def _too_long(*_: object) -> None:
    raise TimeoutError(f"more than {SECONDS_MAX} s")


if __name__ == "__main__":
    sys.exit(main())
