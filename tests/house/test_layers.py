"""The layers of `ckpt_cloud` hold, every room is in its contract, and the contracts can fail."""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "ckpt_cloud"
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]

LAYERS = "Layers point down"
PURE = "Planning, format and protocol are pure"
STORES = "Only stores talk to stores"
NO_TORCH = "No torch below tensors"


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    # The tool looks for the package in the working directory before anywhere else.
    code = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def rooms_from_the_top() -> list[list[str]]:
    """The rooms of each layer; parentheses, which mark a room that may be missing, are taken off."""
    layers = next(contract["layers"] for contract in CONTRACTS if contract["name"] == LAYERS)
    return [[room.strip(" ()") for room in layer.split("|")] for layer in layers]


def test_layers_hold():
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_room_below_tensors_is_kept_from_torch():
    layers = rooms_from_the_top()
    first = next(index for index, layer in enumerate(layers) if "tensors" in layer)
    below = {room for layer in layers[first:] for room in layer if room not in {"tensors", "gpu"}}
    present = {path.stem for path in PACKAGE.iterdir()}
    listed = next(set(contract["source_modules"]) for contract in CONTRACTS if contract["name"] == NO_TORCH)
    assert listed == {f"ckpt_cloud.{room}" for room in below & present}


@pytest.mark.parametrize(
    ("module", "line", "broken"),
    [
        pytest.param("errors.py", "import ckpt_cloud.options", LAYERS, id="upwards"),
        pytest.param("protocol.py", "import asyncio", PURE, id="impure"),
        pytest.param("commit.py", "import boto3", STORES, id="store-library"),
        pytest.param("catalog.py", "def late():\n    import torch", NO_TORCH, id="late-torch"),
        pytest.param("utils.py", "", LAYERS, id="stray-module"),
    ],
)
def test_contracts_can_fail(tmp_path, module, line, broken):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    copy = shutil.copytree(PACKAGE, tmp_path / "ckpt_cloud", ignore=shutil.ignore_patterns("__pycache__"))
    planted = Path(copy) / module
    if not planted.exists() and planted.with_suffix("").is_dir():
        planted = planted.with_suffix("") / "__init__.py"
    with planted.open("a") as file:
        file.write(f"\n\n{line}\n")

    result = lint_imports(tmp_path)

    reported = {line.partition(" BROKEN")[0] for line in result.stdout.splitlines() if " BROKEN" in line}
    assert reported == {broken}, result.stdout + result.stderr
