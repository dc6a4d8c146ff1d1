"""A server that is not installed is a skip that names it, and in CI an error: nothing passes for being skipped."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTS = [f"tests/stores/test_stores_conformance.py::Test{name}::test_delete" for name in ("SeaweedFS", "Azurite")]
# Programs are looked for on PATH and beside Python; of this one nobody knows where it is.
RUN = "import sys, pytest; sys.executable = '/nowhere/python'; sys.exit(pytest.main(sys.argv[1:]))"


def run_without_programs(folder, *, ci):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("CI", "PYTEST_", "CKPT_"))}
    environment["PATH"] = str(folder)
    if ci:
        environment["CI"] = "true"
    command = [sys.executable, "-c", RUN, "-q", "-p", "no:cacheprovider", *TESTS]
    return subprocess.run(command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=150)


@pytest.fixture
def nothing(tmp_path):
    """Azurite is looked for in node_modules too, but is of no use without node."""
    empty = tmp_path / "empty"
    empty.mkdir()
    return empty


def test_on_a_developers_machine_they_are_skipped_by_name(nothing):
    done = run_without_programs(nothing, ci=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 skipped" in done.stdout
    assert "seaweedfs: seaweedfs is not installed: pip install" in done.stdout
    assert "azurite: azurite is not installed: npm install azurite" in done.stdout


def test_in_ci_they_are_errors(nothing):
    done = run_without_programs(nothing, ci=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "2 errors" in done.stdout
    assert "skipped" not in done.stdout
    assert "NotInstalled: seaweedfs is not installed" in done.stdout
    assert "NotInstalled: azurite is not installed" in done.stdout
