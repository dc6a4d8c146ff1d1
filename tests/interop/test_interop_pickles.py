"""Hostile pickles never run, and malformed ones are refused, whatever they are made of."""

import builtins
import io
import os
import pickle
import struct
import subprocess

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import Metadata

from ckpt_cloud.errors import CkptCloudError, CorruptFile, UntrustedItem
from ckpt_cloud.interop.dcp_metadata import ParsedMetadata, names
from ckpt_cloud.interop.pickles import load, walk
from ckpt_cloud.interop.torch_pickles import open_pickle

WHERE = "s3://bucket/run/.metadata"
RAN = []


def ran(*args):
    RAN.append(args)
    return args


class Calls:
    def __init__(self, function, *args):
        self.told = function, args

    def __reduce__(self):
        return self.told


def by_hand(*pieces):
    return b"\x80\x04" + b"".join(pieces) + b"."


def name(module, attribute):
    return b"c" + module.encode() + b"\n" + attribute.encode() + b"\n"


def text(value):
    return b"\x8c" + bytes([len(value)]) + value.encode()


ATTACKS = {
    "os.system": pickle.dumps(Calls(os.system, "true")),
    "own function": pickle.dumps(Calls(ran, 1)),
    "eval": pickle.dumps(Calls(builtins.eval, "1")),
    "exec": pickle.dumps(Calls(builtins.exec, "1")),
    "getattr": pickle.dumps(Calls(builtins.getattr, 1, "real")),
    "import": pickle.dumps(Calls(builtins.__import__, "os")),
    "popen": pickle.dumps(Calls(subprocess.Popen, ["true"])),
    "torch.load": pickle.dumps(Calls(torch.load, "/nowhere")),
    "dynamic import": by_hand(name("torch._dynamo.utils", "import_module"), text("os"), b"\x85R"),
    "dotted name": by_hand(text("torch.serialization"), text("os.system"), b"\x93", text("true"), b"\x85R"),
    "dotted name of an allowed module": by_hand(text("torch"), text("Size.__subclasses__"), b"\x93)R"),
    "a class of DCP that is not metadata": by_hand(name("torch.distributed.checkpoint.filesystem", "FileSystemReader")),
    "memory": by_hand(name("builtins", "bytearray"), b"\x8a\x05\x00\x00\x00\x00\x01\x85R"),
    "extension registry": by_hand(b"\x82\x01"),
    "persistent id": by_hand(text("x"), b"Q"),
    "old instance opcode": by_hand(b"(i", b"os\nsystem\n"),
    "object opcode": by_hand(b"(", name("os", "system"), text("true"), b"o"),
    "text integers": by_hand(b"I1\n"),
    "out-of-band buffers": by_hand(b"\x97"),
}


def doubled(times, *, after=b""):
    """A tuple that holds itself twice, and so on: nothing to hold, and endless to hash."""
    return [b")q\x00", *(b"h%ch%c\x86%sq%c" % (number, number, after, number + 1) for number in range(times))]


BOMBS = {
    "a key": by_hand(*doubled(60), b"0}h\x3cK\x01s"),
    "an element of a set": by_hand(*doubled(60), b"0\x8f(h\x3c\x90"),
    "kept out of sight": by_hand(*doubled(60, after=b"(1"), b"0}h\x3cK\x01s"),
    "built upon": by_hand(*doubled(60, after=b"Nb"), b"0}h\x3cK\x01s"),
    "few levels, many times": by_hand(
        b")q\x00", *(b"(" + bytes((ord("h"), n)) * 250 + b"tq" + bytes((n + 1,)) for n in range(6)), b"0}h\x06K\x01s"
    ),
    "memo numbered in two ways": by_hand(b")q\x00)q\x00)\x94", *doubled(60)[1:], b"0}h\x3cK\x01s"),
    "as a size": by_hand(*doubled(1), name("torch", "Size"), b"h\x01\x85R"),
    "doubled on the stack": by_hand(b")", b"2\x86" * 60, b"}h\x00K\x01s"),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_key_that_takes_forever_to_hash_is_refused(bomb):
    with pytest.raises((CorruptFile, UntrustedItem)):
        ParsedMetadata(BOMBS[bomb], WHERE)


def test_tuples_that_are_met_again_are_no_bombs():
    path, other = ("model", 0), ("model", 1)
    told = Metadata({}, planner_data={str(n): path if n % 2 else other for n in range(200_000)}, storage_data={})
    assert ParsedMetadata(pickle.dumps(told), WHERE).paths["199999"] == path


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_is_refused_and_does_not_run(attack):
    RAN.clear()
    with pytest.raises(UntrustedItem) as refused:
        load(ATTACKS[attack], names(), WHERE)
    assert WHERE in str(refused.value)
    assert RAN == []


@pytest.mark.parametrize("attack", ["os.system", "own function", "getattr"])
def test_the_name_is_told(attack):
    with pytest.raises(UntrustedItem) as refused:
        load(ATTACKS[attack], names(), WHERE)
    expected = {"os.system": "system", "own function": "ran", "getattr": "getattr"}[attack]
    assert expected in refused.value.message


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_in_a_torch_file_is_refused_too(attack):
    with pytest.raises((UntrustedItem, CorruptFile)):
        open_pickle(ATTACKS[attack], WHERE)


MALFORMED = {
    "nothing": b"",
    "no stop": b"\x80\x04N",
    "a memo of gigabytes": by_hand(b"Nr\xff\xff\xff\x7f"),
    "a string beyond the end": by_hand(b"\x8d" + struct.pack("<Q", 1 << 60)),
    "a negative length": by_hand(b"\x8b\xff\xff\xff\xff"),
    "an empty stack": by_hand(b"R"),
    "a size that is called with a name": by_hand(name("torch", "Size"), name("torch", "float32"), b"R"),
    "a dtype that is called": by_hand(name("torch", "float32"), b")R"),
    "a frame beyond the end": by_hand(b"\x95" + struct.pack("<Q", 1 << 40)),
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED)
def test_what_is_malformed_is_told(data):
    with pytest.raises(CorruptFile):
        load(data, names(), WHERE)


def test_attributes_that_a_pickle_sets_on_a_class_do_not_outlive_it():
    module = "torch.distributed.checkpoint.metadata"
    change = by_hand(name(module, "MetadataIndex"), b"N}", text("state"), text("spoilt"), b"s\x86b")
    with pytest.raises(CkptCloudError):
        load(change, names(), WHERE)
    assert names()[module, "MetadataIndex"].state is None
    assert dcp.metadata.MetadataIndex("a") == dcp.metadata.MetadataIndex("a")


def test_a_pickle_of_anything_else_is_not_metadata():
    for value in (None, 1, [], {"state_dict_metadata": {}}, "x"):
        with pytest.raises(CorruptFile):
            ParsedMetadata(pickle.dumps(value), WHERE)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
    max_leaves=20,
)


@given(value=PLAIN, protocol=st.integers(2, 5), after=st.binary(max_size=8))
def test_plain_values_come_back_and_their_end_is_found(value, protocol, after):
    data = pickle.dumps(value, protocol)
    try:
        assert walk(data + after) == len(data)
    except UntrustedItem:
        # Protocol 2 has no bytes: it calls codecs.encode.
        assert protocol == 2
        return
    try:
        assert load(data, {}, WHERE) == value
    except UntrustedItem:
        assert protocol == 2


@given(data=st.binary(max_size=200), cut=st.integers(0, 2000))
def test_no_bytes_get_through_as_anything_but_an_error_of_ours(data, cut):
    good = io.BytesIO()
    pickle.dump({"a": [1, 2, (3, "x" * 50)]}, good)
    for attempt in (data, good.getvalue()[:cut], good.getvalue()[:cut] + data):
        try:
            load(attempt, names(), WHERE)
        except CkptCloudError:
            continue
