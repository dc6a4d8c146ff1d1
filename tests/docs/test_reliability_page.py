"""docs/reliability.md and docs/commit.md name tests that exist, and leave no row out."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REFERENCE = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
ROWS = [*(str(number) for number in range(1, 75)), "66b", "66c"]
ANSWERS = [f"A{number}" for number in range(1, 21)]


def names_in(path):
    """Functions and classes of a test file, methods included."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)}


def rows_of(page, form):
    lines = (ROOT / "docs" / page).read_text().splitlines()
    return {found[1]: line for line in lines if (found := re.match(form, line))}


@pytest.mark.parametrize("page", ["reliability.md", "commit.md"])
def test_every_test_that_is_named_exists(page):
    references = set(REFERENCE.findall((ROOT / "docs" / page).read_text()))
    assert len(references) > 15
    gone = [f"{path}::{name}" for path, name in sorted(references) if name not in names_in(ROOT / path)]
    assert gone == []


def test_every_fault_has_a_test_or_a_reason():
    rows = rows_of("reliability.md", r"\| (\d+[bc]?) \|")
    assert sorted(rows) == sorted(ROWS)
    silent = [name for name, row in rows.items() if not REFERENCE.search(row) and "Not " not in row]
    assert silent == []


def test_every_answer_has_a_test_or_a_reason():
    rows = rows_of("commit.md", r"\| (A\d+) \|")
    assert sorted(rows) == sorted(ANSWERS)
    silent = [name for name, row in rows.items() if not REFERENCE.search(row) and "does not arise" not in row]
    assert silent == []
