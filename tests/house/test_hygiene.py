"""What no linter says: sizes, leftovers, and traces of the machine that something was written on."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted((ROOT / "ckpt_cloud").rglob("*.py"))
MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 80

# In pieces, so that this file does not find itself.
MACHINE = re.compile(rf"(?<![\w.*])/{'work'}/|/opt/{'wheels'}|/{'root'}/\.")
REGISTRY = re.compile(rf"\b(py{'pi'}\.org|files\.python{'hosted'}|registry\.{'npm'}js|deb\.{'debian'}\.org)")
LEFTOVERS = re.compile(r"\bTODO\b|\bFIXME\b|\bXXX\b|\braise NotImplementedError\b")


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tracked() -> list[Path]:
    """What git has, and what it would take."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout
    return [path for name in sorted(set(listed.split("\0")) - {""}) if (path := ROOT / name).is_file()]


def lines_with(pattern: re.Pattern[str], paths: list[Path]) -> list[str]:
    return [
        f"{named(path)}:{number}: {line.strip()[:120]}"
        for path in paths
        for number, line in enumerate(path.read_bytes().decode(errors="replace").splitlines(), 1)
        if pattern.search(line)
    ]


def test_nothing_names_this_machine():
    assert lines_with(MACHINE, tracked()) == []


def test_nothing_names_a_registry():
    assert lines_with(REGISTRY, tracked()) == []


def test_nothing_is_left_undone():
    assert lines_with(LEFTOVERS, MODULES) == []


def test_modules_are_short():
    assert MODULES
    lengths = {named(path): len(path.read_text().splitlines()) for path in MODULES}
    assert {name: length for name, length in lengths.items() if length > MAX_MODULE_LINES} == {}


def test_functions_are_short():
    too_long = [
        f"{named(path)}:{node.lineno}: {node.name} has {length} lines"
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or node.lineno) - node.lineno + 1) > MAX_FUNCTION_LINES
    ]
    assert too_long == []
