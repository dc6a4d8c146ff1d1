"""The Python blocks of docs/testing.md run as they stand: each is a test file of its own, or a script."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "testing.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
TESTS = [block for block in BLOCKS if re.search(r"^def test_", block, re.MULTILINE)]
SCRIPTS = [block for block in BLOCKS if block not in TESTS]


def run(arguments, directory):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run(
        [sys.executable, "-Wignore:torch.distributed is disabled:UserWarning", *arguments],
        cwd=directory,
        env=environment | {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_blocks_with_tests_pass(tmp_path):
    for number, block in enumerate(TESTS):
        (tmp_path / f"test_block_{number}.py").write_text(block)
    shown = run(["-m", "pytest", "-p", "ckpt_cloud.testing.plugin", "-p", "no:cacheprovider"], tmp_path)
    assert f"{sum(block.count('def test_') for block in TESTS)} passed" in shown


@pytest.mark.parametrize("script", SCRIPTS, ids=range(len(SCRIPTS)))
def test_scripts_run(script, tmp_path):
    (tmp_path / "script.py").write_text(script)
    assert run(["script.py"], tmp_path)


def test_the_page_names_what_there_is():
    from ckpt_cloud.testing import Faults
    from ckpt_cloud.testing.faulty import OPERATIONS

    page = PAGE.read_text()
    assert len(TESTS) == 3
    assert len(SCRIPTS) == 2
    public = {name for name in vars(Faults) if name[0] != "_"} - {"watched"}
    assert {name for name in public if not re.search(rf"\b{name}\b", page)} == set()
    assert [name for name in OPERATIONS if f"`{name}`" not in page] == []
