"""The page: figures, the treemap, what each rank stored, the timeline."""

from __future__ import annotations

from html import escape
from pathlib import Path

from rich.filesize import decimal

from ckpt_cloud.cli.contents import Contents, item_bytes, shape_text, tensor_bytes, writers
from ckpt_cloud.cli.output import utc
from ckpt_cloud.cli.picture.drawing import PALETTE, rect, svg, text, treemap
from ckpt_cloud.cli.picture.timeline import read, timeline
from ckpt_cloud.cli.picture.treemap import Box, Node

_WIDTH = 1000.0
_MOST_RANKS = 128
_LABEL = 330.0
_STYLE = """
:root { color-scheme: light dark; }
body { font: 14px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.2rem; overflow-wrap: anywhere; } h2 { font-size: 1rem; margin-top: 2rem; }
svg { width: 100%; height: auto; display: block; }
svg rect { stroke: Canvas; stroke-width: .8; } svg rect:hover { filter: brightness(.88); }
svg text { font: 11px ui-monospace, monospace; fill: #15181d; pointer-events: none; }
svg text.small { font-size: 10px; fill: CanvasText; } svg text.dark { fill: #15181d; }
svg line.tick { stroke: CanvasText; stroke-opacity: .15; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem; } dt { opacity: .65; } dd { margin: 0; }
dd { overflow-wrap: anywhere; }
"""


def write(contents: Contents, path: Path, traces: list[Path]) -> None:
    """Writes the page of a checkpoint to `path`."""
    path.write_text(page(contents, traces), encoding="utf-8")


def page(contents: Contents, traces: list[Path]) -> str:
    """The whole page."""
    url = escape(contents.location.url)
    rows = read(traces)
    parts = [
        f"<h1>{url}</h1>",
        _facts(contents),
        "<h2>Where the bytes are</h2>",
        treemap(_tree(contents), _WIDTH, 520),
        "<h2>Objects and shards of each rank</h2>",
        _ranks(contents),
    ]
    if rows:
        parts += ["<h2>Timeline</h2>", timeline(rows, _WIDTH)]
    # Nothing may run or be fetched, whatever the names in a checkpoint say.
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{url}</title><style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>"
    )


def _facts(contents: Contents) -> str:
    manifest = contents.manifest
    facts = {
        "saved": f"{utc(contents.saved_unix_s)} UTC",
        "by": manifest.writer,
        "attempt": manifest.attempt,
        "tensors": f"{len(manifest.tensors)}, {decimal(sum(map(tensor_bytes, manifest.tensors.values())))}",
        "items": f"{len(manifest.items)}, {decimal(sum(map(item_bytes, manifest.items.values())))}",
        "objects": f"{len(manifest.objects)}, {decimal(contents.stored_bytes)}",
    }
    facts |= {f"metric {name}": f"{value:g}" for name, value in contents.metrics.items()}
    facts |= {str(name): str(value)[:2000] for name, value in (manifest.user_metadata or {}).items()}
    return f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{escape(said)}</dd>' for name, said in facts.items())}</dl>"


def _tree(contents: Contents) -> Node:
    root = Node("", "")
    for name, tensor in contents.manifest.tensors.items():
        said = f"{tensor.dtype}, {shape_text(tensor)}, {len(tensor.chunks)} shard(s)"
        root.add(name, tensor_bytes(tensor), said)
    for name, item in contents.manifest.items.items():
        root.add(name, item_bytes(item), "item")
    return root


def _ranks(contents: Contents) -> str:
    manifest = contents.manifest
    ranks = writers(manifest)
    shards = [0] * len(manifest.objects)
    for tensor in manifest.tensors.values():
        for number in (number for chunk in tensor.chunks for number in set(chunk.objects)):
            shards[number] += 1
    count = min(_MOST_RANKS, max(ranks, default=-1) + 1)
    sizes = [sum(e.size for e, r in zip(manifest.objects, ranks, strict=True) if r == rank) for rank in range(count)]
    scale = (_WIDTH - _LABEL) / max([*sizes, 1])
    drawn = []
    for rank in range(count):
        mine = [number for number, each in enumerate(ranks) if each == rank]
        held = sum(shards[number] for number in mine)
        said = f"rank {rank}: {len(mine)} object(s), {held} shard(s), {decimal(sizes[rank])}"
        x, y = _LABEL, rank * 20.0
        drawn.append(text(0, y + 13, said, "small"))
        for number in mine:
            entry = manifest.objects[number]
            title = f"{entry.key}\n{decimal(entry.size)}\n{shards[number]} shard(s)"
            drawn.append(rect(Box(x, y + 2, entry.size * scale, 15), PALETTE[rank % len(PALETTE)], title))
            x += entry.size * scale
    more = f"<p>{max(ranks) + 1 - count} more ranks are not shown.</p>" if ranks and max(ranks) + 1 > count else ""
    return svg(_WIDTH, max(1, count) * 20.0, "".join(drawn), "objects of each rank") + more
