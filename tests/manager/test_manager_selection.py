"""Parts of a state by patterns."""

import pytest

from ckpt_cloud.errors import InvalidOption
from ckpt_cloud.manager.selection import put_back, select


def state():
    return {"model": {"body": {"w": 1, "b": 2}, "head": {"w": 3}}, "optimizer": {"m": [4, 5]}, "step": 6, "empty": {}}


@pytest.mark.parametrize(
    ("only", "exclude", "left"),
    [
        ((), (), state()),
        (("model",), (), {"model": state()["model"]}),
        ("model", (), {"model": state()["model"]}),
        (("model.head.*", "step"), (), {"model": {"head": {"w": 3}}, "step": 6}),
        (("*.w",), (), {"model": {"body": {"w": 1}, "head": {"w": 3}}}),
        ((), ("optimizer",), {"model": state()["model"], "step": 6, "empty": {}}),
        (("model",), ("model.head",), {"model": {"body": {"w": 1, "b": 2}}}),
        (("empty",), (), {"empty": {}}),
    ],
)
def test_select(only, exclude, left):
    given = state()
    assert select(given, only=only, exclude=exclude) == left
    assert given == state()


@pytest.mark.parametrize(
    ("only", "exclude"), [(("modal",), ()), ((), ("optimiser",)), (("model",), ("model",)), (("",), ())]
)
def test_patterns_that_cannot_be_meant_are_refused(only, exclude):
    with pytest.raises(InvalidOption):
        select(state(), only=only, exclude=exclude)


def test_values_come_back_to_their_places():
    given = state()
    part = select(given, only=("model.head", "step"))
    part["model"]["head"]["w"], part["step"] = 30, 60
    put_back(given, part)
    assert given == {**state(), "model": {"body": {"w": 1, "b": 2}, "head": {"w": 30}}, "step": 60}
