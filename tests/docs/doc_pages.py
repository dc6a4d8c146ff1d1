"""README, CONTRIBUTING and docs/**.md: their fenced blocks, links and anchors."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [
    *(page for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md") if (page := ROOT / name).exists()),
    *sorted((ROOT / "docs").rglob("*.md")),
]

_FENCE = re.compile(
    r"^(?P<indent> *)(?P<fence>`{3,})(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=indent)(?P=fence) *$",
    re.MULTILINE | re.DOTALL,
)
_REASON = re.compile(r"<!-- not run: (.+?) -->\s*\Z", re.DOTALL)


@dataclass(frozen=True)
class Block:
    page: str
    language: str
    code: str
    line: int
    reason: str
    """Why it is not run, from a comment right before it; empty when it is."""


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def blocks_of(page):
    text = page.read_text()
    found = []
    for fence in _FENCE.finditer(text):
        before = text[: fence.start()]
        reason = _REASON.search(before)
        line = before.count("\n") + 1
        found.append(Block(name_of(page), fence["language"], fence["code"], line, reason[1] if reason else ""))
    return found


def without_code(page):
    """The page's text without fenced blocks and inline code, in which brackets are no links."""
    return re.sub(r"`[^`\n]*`", "", _FENCE.sub("", page.read_text()))


def python_of(name):
    """The Python blocks of docs/`name` as one script."""
    return "\n".join(block.code for block in blocks_of(ROOT / "docs" / name) if block.language == "python")


def anchors_of(page):
    """The anchors that GitHub gives to a page's headings, and scripts/docs too."""
    text = _FENCE.sub("", page.read_text())
    anchors = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        number = sum(1 for each in anchors if re.fullmatch(rf"{re.escape(slug)}(-\d+)?", each))
        anchors.add(f"{slug}-{number}" if slug in anchors else slug)
    return anchors
