"""The page on DCP has a row for each of its modules, names tests that there are, and its blocks run."""

import inspect
import pkgutil
import re
from pathlib import Path

import torch.distributed.checkpoint as dcp

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/dcp-compatibility.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in PAGE.splitlines()
    if re.match(r"\| `_?\w+(\.\w+)?`(, `[\w.]+`)* \| ", line) and line.count(" | ") == 3
]


def test_every_module_has_one_row():
    there = [
        module.name.removeprefix(f"{dcp.__name__}.")
        for module in pkgutil.walk_packages(dcp.__path__, f"{dcp.__name__}.")
    ]
    named = [name for row in ROWS for name in re.findall(r"`([\w.]+)`", row[0])]
    assert sorted(named) == sorted(there)


def test_every_test_that_is_named_exists():
    named = set(re.findall(r"`(test_\w+\.py)::(\w+)`", PAGE))
    assert len(named) > 40
    missing = [
        (file, test)
        for file, test in named
        if not (path := ROOT / "tests/dcp" / file).exists()
        or not re.search(rf"^def {test}\(", path.read_text(), re.MULTILINE)
    ]
    assert missing == []


def test_every_test_elsewhere_that_is_named_exists():
    named = set(re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", PAGE))
    assert len(named) > 5
    for file, name in named:
        assert re.search(
            rf"^(def|class) {name}\b" if name else r"^    def test_|^def test_", text_of(file), re.MULTILINE
        )


def text_of(file):
    return (ROOT / file).read_text()


def test_every_public_name_of_the_package_is_there():
    names = {name for name, value in vars(dcp).items() if not name.startswith("_") and not inspect.ismodule(value)}
    assert len(names) > 25
    assert {name for name in names if f"`{name}`" not in PAGE} == set()


def test_what_works_is_shown_and_what_does_not_has_a_reason():
    for module, works, shown, not_offered in ROWS:
        assert works or not_offered, module
        assert "::" in works + shown or not_offered, module


def test_blocks_run():
    selecting, plugging = BLOCKS
    exec(compile(selecting, "docs/dcp-compatibility.md", "exec"), {})
    assert plugging in (ROOT / "tests/dcp/checkpointers.py").read_text()
