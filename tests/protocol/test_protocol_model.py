"""docs/model/commit_model.py: the shipped decisions, in every order; and weakened ones, which are caught."""

import importlib.util
import sys
from pathlib import Path

import pytest

from ckpt_cloud.protocol import Committed

PATH = Path(__file__).parents[2] / "docs/model/commit_model.py"


def loaded():
    spec = importlib.util.spec_from_file_location("commit_model", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["commit_model"] = module
    spec.loader.exec_module(module)
    return module


model = loaded()
SMALL = {
    model.Case("committed", (False, True), "collector"),
    model.Case("committed", (False, True), "deleter"),
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case in SMALL else pytest.mark.slow) for case in model.CASES],
    ids=lambda case: f"{case.before}-{case.overwrite}-{case.cleaner}",
)
def test_every_order_of_two_writers_a_cleaner_and_a_reader(case):
    found = model.explore(model.beginning(case))
    if case.before == "committed" and not any(case.overwrite) and case.cleaner == "collector":
        # Both are refused at once; nothing can be won or be left unknown.
        assert Committed not in found.outcomes
    else:
        assert {Committed, None} <= found.outcomes, "some win, some never learn"


@pytest.mark.parametrize("name", model.WEAKENED)
def test_a_weakened_protocol_is_caught(name):
    with pytest.raises(model.Broken) as broken:
        model.weakened(name)
    assert any(note.startswith("after ") for note in broken.value.__notes__)
