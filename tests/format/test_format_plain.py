"""Plain values survive MessagePack with their types; nothing else gets in, and nothing odd gets out."""

import collections
import datetime as dt
import enum

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_cloud.errors import CorruptManifest, Unsupported
from ckpt_cloud.format.plain import lower, raise_up

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5)
)
keys = st.recursive(scalars, lambda inner: st.lists(inner, max_size=2).map(tuple), max_leaves=3)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(keys, inner, max_size=3)
    ),
    max_leaves=12,
)


def travelled(value):
    return raise_up(msgspec.msgpack.decode(msgspec.msgpack.encode(lower(value, "it"))))


@given(values)
def test_round_trip(value):
    # repr tells True from 1 and (1,) from [1], and finds two NaNs alike.
    assert repr(travelled(value)) == repr(value)


class Colour(enum.IntEnum):
    RED = 1


class Text(str):
    __slots__ = ()


@pytest.mark.parametrize(
    "value",
    [
        {1, 2},
        1j,
        pytest.param(object(), id="object"),
        int,
        bytearray(b"x"),
        2**64,
        -(2**63) - 1,
        Colour.RED,
        Text("x"),
        collections.OrderedDict(a=1),
        dt.datetime(2026, 1, 1, tzinfo=dt.UTC),
    ],
    ids=repr,
)
@pytest.mark.parametrize(
    "place",
    [lambda v: v, lambda v: [v], lambda v: ("x", (v,)), lambda v: {"a": {"b": v}}],
    ids=["bare", "list", "tuple", "dict"],
)
def test_other_types_are_refused(value, place):
    with pytest.raises(Unsupported, match=rf"the planner's data holds a {type(value).__name__}\b"):
        lower(place(value), "the planner's data")


def test_a_value_that_holds_itself_is_refused():
    loop = []
    loop.append(loop)
    with pytest.raises(Unsupported):
        lower(loop, "it")


@pytest.mark.parametrize(
    "stored",
    [
        [1],
        {},
        {"x": []},
        {"l": [], "t": []},
        {"l": 5},
        {"t": None},
        {"l": "text"},
        {"l": {"a": 1}},
        {"d": 5},
        {"d": [1]},
        {"d": [[1]]},
        {"d": [[1, 2, 3]]},
        {"d": ["ab"]},
        {"d": [[{"l": []}, 1]]},
        {"l": [[1]]},
        {1: []},
        pytest.param(msgspec.msgpack.Ext(5, b"x"), id="extension"),
        pytest.param({"l": [msgspec.msgpack.Ext(5, b"x")]}, id="extension-inside"),
        dt.datetime(2026, 1, 1, tzinfo=dt.UTC),
    ],
    ids=repr,
)
def test_what_lower_does_not_make_is_corrupt(stored):
    with pytest.raises(CorruptManifest):
        raise_up(stored)


def test_deep_nesting_is_corrupt():
    stored = 0
    for _ in range(100_000):
        stored = {"l": [stored]}
    try:
        with pytest.raises(CorruptManifest):
            raise_up(stored)
    finally:
        while stored:  # one level at a time: freeing it at once would need as deep a stack
            stored = stored["l"].pop()


stored_values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["l", "t", "d", "x"]) | scalars, inner, max_size=2)
        | st.builds(lambda pairs: {"d": pairs}, st.lists(st.tuples(inner, inner).map(list), max_size=2))
    ),
    max_leaves=10,
)


@given(stored_values)
def test_any_stored_value_is_raised_or_corrupt(stored):
    try:
        value = raise_up(stored)
    except CorruptManifest:
        return
    assert repr(travelled(value)) == repr(value)
