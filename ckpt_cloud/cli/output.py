"""What commands print: JSON for programs, tables for people."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from typing import Any

import msgspec
from rich.console import Console

_PIPED_COLUMNS = 240
_SEEN = sys.stdout is not None and sys.stdout.isatty()
console = Console(soft_wrap=True, highlight=False, markup=False, width=None if _SEEN else _PIPED_COLUMNS)
"""Standard output, for people; what reads a pipe can take long lines."""


def print_json(value: Any) -> None:
    """Prints `value`, and nothing else, on standard output."""
    print(msgspec.json.format(msgspec.json.encode(value)).decode())


def note(text: str) -> None:
    """Prints beside the result, on standard error."""
    print(text, file=sys.stderr)


def utc(unix_s: float) -> str:
    """A moment for people; empty for none."""
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%d %H:%M:%S") if unix_s else ""
