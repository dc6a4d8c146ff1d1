"""Sizes as nested rectangles (Bruls, Huizing, van Wijk: Squarified Treemaps, 2000). Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle."""

    x: float
    y: float
    width: float
    height: float


@dataclass(slots=True)
class Node:
    """A part of the whole: a leaf with a size, or others below it.

    Attributes:
        name: of this level.
        path: of all levels.
        said: of a leaf, for people.
    """

    name: str
    path: str
    size: int = 0
    said: str = ""
    children: dict[str, Node] = field(default_factory=dict)

    def add(self, path: str, size: int, said: str) -> None:
        """Puts a leaf where its dotted path says; all above it grow."""
        node = self
        node.size += size
        walked = []
        for name in path.split("."):
            walked.append(name)
            node = node.children.setdefault(name, Node(name, ".".join(walked)))
            node.size += size
        node.said = said

    def below(self) -> list[Node]:
        """Children with a size, largest first."""
        return sorted((child for child in self.children.values() if child.size), key=lambda n: (-n.size, n.name))


def squarify(sizes: Sequence[int], box: Box) -> list[Box]:
    """A box for each size, largest first, of areas in proportion, together filling `box`."""
    boxes: list[Box] = []
    rest, scale = box, box.width * box.height / max(1, sum(sizes))
    at = 0
    while at < len(sizes):
        side = min(rest.width, rest.height)
        end = at + 1
        while end < len(sizes) and _worst(sizes[at : end + 1], side, scale) <= _worst(sizes[at:end], side, scale):
            end += 1
        row, rest = _lay(sizes[at:end], rest, scale)
        boxes += row
        at = end
    return boxes


def _worst(row: Sequence[int], side: float, scale: float) -> float:
    """The most oblong of a row of boxes along `side`."""
    area = sum(row) * scale
    if not area or not side:
        return float("inf")
    largest, smallest = max(row) * scale, min(row) * scale
    return max(side**2 * largest / area**2, area**2 / (side**2 * smallest) if smallest else float("inf"))


def _lay(row: Sequence[int], box: Box, scale: float) -> tuple[list[Box], Box]:
    """Boxes of a row along the shorter side, and what is left."""
    total = sum(row)
    upright = box.width >= box.height
    side = box.height if upright else box.width
    thick = total * scale / side if side else 0.0
    boxes, along = [], 0.0
    for size in row:
        length = side * size / total if total else 0.0
        place = (box.x, box.y + along, thick, length) if upright else (box.x + along, box.y, length, thick)
        boxes.append(Box(*place))
        along += length
    if upright:
        return boxes, Box(box.x + thick, box.y, max(0.0, box.width - thick), box.height)
    return boxes, Box(box.x, box.y + thick, box.width, max(0.0, box.height - thick))
