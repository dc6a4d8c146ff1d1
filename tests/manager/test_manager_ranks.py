"""Managers on real ranks: rank 0 asks the store, all get the same answer."""

import json
import sys
from pathlib import Path

import pytest

import ckpt_cloud

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "dcp"))

import manager_cases
import ranks


@pytest.fixture(autouse=True)
def importable_in_ranks(monkeypatch):
    """Spawned ranks import their cases by name."""
    here = Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", f"{here}:{here.parent / 'dcp'}:{Path(ckpt_cloud.__file__).parents[1]}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_a_lifetime(tmp_path):
    told = ranks.run(3, manager_cases.lifetime, tmp_path, f"file://{tmp_path}/run", str(tmp_path / "traces"))
    assert told[0] == told[1] == told[2]
    assert told[0][:-2] == [None, 4, 4, {"loss": 3.0}, False, 4, 4, [3, 4]]
    assert told[0][-2][0] == "CheckpointNotFound"
    assert told[0][-1][0] == "InvalidOption"
    assert "closed" in told[0][-1][1]
    trace = json.loads((tmp_path / "traces/save-4.json").read_text())
    assert {row["pid"] for row in trace["traceEvents"] if row.get("cat") == "up"} == {0, 1, 2}
    assert {row["pid"] for row in trace["traceEvents"] if row.get("name") == "commit"} == {0}


def test_all_fall_back_together(tmp_path):
    assert ranks.run(2, manager_cases.fall_back, tmp_path, f"file://{tmp_path}/run") == [(1, 1, [2])] * 2


def test_a_signal_to_one_stops_all(tmp_path):
    assert ranks.run(2, manager_cases.one_is_told_to_stop, tmp_path, f"file://{tmp_path}/run") == [(False, True)] * 2


def test_all_are_told_that_the_check_failed(tmp_path):
    (tmp_path / "file").write_text("not a directory")
    told = ranks.run(2, manager_cases.refused, tmp_path, f"file://{tmp_path}/file/run")
    assert told[0] == told[1]
    assert told[0] is not None


def test_ranks_save_together(tmp_path):
    """By a clock that is rank 0's, and for a signal that comes to rank 1 alone, and later to rank 0 too."""
    told = ranks.run(2, manager_cases.saves_when_due, tmp_path, f"file://{tmp_path}/run")
    assert told == [([2, 3, 6, 9], [2, 3, 6, 9])] * 2
