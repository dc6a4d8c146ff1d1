"""SVG as text. Every name comes from storage, so every one is escaped here."""

from __future__ import annotations

from html import escape

from rich.filesize import decimal

from ckpt_cloud.cli.picture.treemap import Box, Node, squarify

PALETTE = ("#8fb3d9", "#f4b678", "#93c98b", "#ec9a9b", "#a9d3cf", "#f0da83", "#c9a9cb", "#c4a992")
"""Light enough for dark letters; in turn for the topmost names."""
_HEAD = 16.0
_LEAST = 1.5
"""Boxes of fewer pixels on a side are not drawn; what they are part of shows their place."""
_LETTER = 6.6


def treemap(root: Node, width: float, height: float) -> str:
    """The whole as nested boxes."""
    children = root.below()
    boxes = squarify([child.size for child in children], Box(0, 0, width, height))
    drawn = [
        _node(child, box, PALETTE[number % len(PALETTE)])
        for number, (child, box) in enumerate(zip(children, boxes, strict=True))
    ]
    return svg(width, height, "".join(drawn), "where the bytes are")


def svg(width: float, height: float, body: str, label: str) -> str:
    """A drawing that scales with the page."""
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(label)}" '
        f'xmlns="http://www.w3.org/2000/svg">{body}</svg>'
    )


def rect(box: Box, fill: str, title: str) -> str:
    """A box that tells `title` when it is pointed at."""
    return (
        f'<rect x="{box.x:.2f}" y="{box.y:.2f}" width="{box.width:.2f}" height="{box.height:.2f}" fill="{fill}">'
        f"<title>{escape(title)}</title></rect>"
    )


def text(x: float, y: float, said: str, kind: str = "", room: float | None = None) -> str:
    """Letters, cut to the room that there is."""
    if room is not None:
        letters = int(room / _LETTER)
        said = said if len(said) <= letters else said[: max(0, letters - 1)] + "…"
        if letters < 3:
            return ""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{escape(said)}</text>'


def _node(node: Node, box: Box, fill: str) -> str:
    if box.width < _LEAST or box.height < _LEAST:
        return ""
    label = node.name
    # A chain of single names is one box.
    while len(node.children) == 1:
        (node,) = node.children.values()
        label += f".{node.name}"
    drawn = rect(box, fill, _title(node))
    tall = box.height > _HEAD
    drawn += text(box.x + 4, box.y + 12, label, "", box.width - 8) if tall else ""
    if not node.children or box.height < 2 * _HEAD:
        return drawn
    inner = Box(box.x + 2, box.y + _HEAD, max(0.0, box.width - 4), max(0.0, box.height - _HEAD - 2))
    children = node.below()
    boxes = squarify([child.size for child in children], inner)
    return drawn + "".join(_node(child, place, fill) for child, place in zip(children, boxes, strict=True))


def _title(node: Node) -> str:
    said = node.said or f"{len(node.children)} below"
    return f"{node.path}\n{decimal(node.size)}\n{said}"
