"""A trace file as a timeline: a row for each thing that was under way, grouped by rank."""

from __future__ import annotations

from pathlib import Path

import msgspec
from rich.filesize import decimal

from ckpt_cloud.cli.picture.drawing import rect, svg, text
from ckpt_cloud.cli.picture.treemap import Box
from ckpt_cloud.errors import InvalidOption

_COLOURS = {"up": "#5b8fc7", "down": "#5fa55a", "phase": "#b9bcc4"}
_ROW, _LEFT, _MOST_ROWS, _TICKS = 14.0, 130.0, 200, 8


class Row(msgspec.Struct):
    """One event of a trace; of other kinds than complete ones only the kind counts."""

    ph: str
    pid: int = 0
    tid: int = 0
    name: str = ""
    ts: float = 0.0
    dur: float = 0.0
    cat: str = ""
    args: dict[str, str | int | float] = {}


class _File(msgspec.Struct):
    traceEvents: list[Row]  # noqa: N815 - the format's name


def read(paths: list[Path]) -> list[Row]:
    """Events of the trace files.

    Raises:
        InvalidOption: one is not there, or is no trace.
    """
    rows: list[Row] = []
    for path in paths:
        try:
            rows += msgspec.json.decode(path.read_bytes(), type=_File).traceEvents
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            hint = "give a file that CheckpointManager(trace_dir=...) or Trace.write left"
            raise InvalidOption(f"{path} is no trace file: {error}", hint=hint) from None
    return [row for row in rows if row.ph == "X"]


def timeline(rows: list[Row], width: float) -> str:
    """The events over time."""
    lanes = sorted({(row.pid, row.tid) for row in rows})
    shown = {lane: number for number, lane in enumerate(lanes[:_MOST_ROWS])}
    end = max((row.ts + row.dur for row in rows), default=1.0) or 1.0
    scale = (width - _LEFT) / end
    height = _ROW * (len(shown) + 2)
    body = [_tick(end * number / _TICKS, _LEFT + (width - _LEFT) * number / _TICKS, height) for number in range(_TICKS)]
    ranks: set[int] = set()
    for (rank, lane), number in shown.items():
        said = f"rank {rank}" if rank not in ranks else ""
        ranks.add(rank)
        body.append(text(0, _ROW * (number + 1) + 10, said or ("" if lane else "phases"), "small"))
    body += [_bar(row, shown[row.pid, row.tid], scale) for row in rows if (row.pid, row.tid) in shown]
    left_out = f"<p>{len(lanes) - len(shown)} more rows are not shown.</p>" if len(lanes) > len(shown) else ""
    return svg(width, height, "".join(body), "timeline") + left_out


def _bar(row: Row, number: int, scale: float) -> str:
    box = Box(_LEFT + row.ts * scale, _ROW * (number + 1) + 1, max(0.7, row.dur * scale), _ROW - 2)
    size = row.args.get("bytes")
    said = f"{row.name} (rank {row.pid})\n{row.dur / 1e6:.4f} s" + (f"\n{decimal(int(size))}" if size else "")
    drawn = rect(box, _COLOURS.get(row.cat, "#999999"), said)
    return drawn + (text(box.x + 3, box.y + 10, row.name, "small dark", box.width - 6) if row.cat == "phase" else "")


def _tick(at_us: float, x: float, height: float) -> str:
    line = f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height:.0f}" class="tick"/>'
    return line + text(x + 2, 10, f"{at_us / 1e6:.3g} s", "small")
