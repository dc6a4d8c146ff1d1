"""What commands print: JSON for programs, tables for people."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

import msgspec
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

_PIPED_COLUMNS = 240
_SEEN = sys.stdout is not None and sys.stdout.isatty()
# Whoever can write to a bucket may name things there so that they speak to a terminal, or turn text around.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """`text` with what is no text escaped, as in Python's own notation."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class _Console(Console):
    """Prints names from storage as text, whatever is in them."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


console = _Console(soft_wrap=True, highlight=False, markup=False, width=None if _SEEN else _PIPED_COLUMNS)
"""Standard output, for people; what reads a pipe can take long lines."""


def print_json(value: Any) -> None:
    """Prints `value`, and nothing else, on standard output."""
    print(msgspec.json.format(msgspec.json.encode(value)).decode())


def note(text: str) -> None:
    """Prints beside the result, on standard error."""
    print(printable(text), file=sys.stderr)


def utc(unix_s: float) -> str:
    """A moment for people; empty for none."""
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%d %H:%M:%S") if unix_s else ""
