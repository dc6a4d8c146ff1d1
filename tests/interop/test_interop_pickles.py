"""Hostile pickles never run, and malformed ones are refused, whatever they are made of."""

import builtins
import io
import os
import pickle
import struct
import subprocess
import zipfile

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import Metadata

from ckpt_cloud.errors import CkptCloudError, CorruptFile, UntrustedItem
from ckpt_cloud.interop.dcp_metadata import ParsedMetadata, names
from ckpt_cloud.interop.pickle_walk import walk
from ckpt_cloud.interop.pickles import load
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


def doubled(container, levels=100):
    """A container of two of a container of two of ...: a few hundred bytes that stand for 2**levels values."""
    return container[0] + b"\x94" + b"".join(b"0" + container[1] % (n, n) + b"\x94" for n in range(levels))


TUPLES = doubled((b")\x85", b"h%ch%c\x86"))
LISTS = doubled((b"]", b"](h%ch%ce"))
DEEP = b")" + b"\x85" * 200_000
BOMBS = {
    "a key of tuples": by_hand(b"}", TUPLES, b"Ns"),
    "a key of tuples among others": by_hand(b"}(", text("a"), b"N", TUPLES, b"Nu"),
    "a key of a dict at once": by_hand(b"(", TUPLES, b"N", b"d"),
    "an element of a set": by_hand(b"\x8f(", TUPLES, b"\x90"),
    "an element of a frozen set": by_hand(b"(", TUPLES, b"\x91"),
    "a key taken out of the memo": by_hand(TUPLES, b"0}h\x60Ns"),
    "a key that is doubled": by_hand(b"}", TUPLES, b"2\x86Ns"),
    "a key made by a call": by_hand(b"}", name("torch", "Size"), TUPLES, b"RNs"),
    "a key of lists made by a call": by_hand(b"}", name("torch", "Size"), b"](", TUPLES, b"e\x85RNs"),
    "a set made by a call": by_hand(name("builtins", "set"), b"](", TUPLES, b"e\x85R"),
    "pairs of a dict made by a call": by_hand(name("collections", "OrderedDict"), b"](", TUPLES, b"N\x86e\x85R"),
    "a key on the last of the stack": by_hand(b"}", DEEP, b"Ns"),
    "a key that is deep by marks": by_hand(b"}", b"(" * 200_000, b"t" * 200_000, b"Ns"),
    "many large keys": by_hand(b"}(", b"N" * 900, b"t\x940", b"h\x00Ns" * 200_000),
    "many large numbers": by_hand(b"}", b"\x8b\x00\x1f\x00\x00", b"\x01" * 7936, b"\x940", b"h\x00Ns" * 200_000),
    "a text of lists": by_hand(name("torch.serialization", "_get_layout"), LISTS, b"\x85R"),
    "a number of lists": by_hand(
        name("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"), LISTS, b"\x85R"
    ),
    "a size of lists": by_hand(name("torch", "Size"), LISTS, b"\x85R"),
    "a size of 100,000 dimensions": by_hand(name("torch", "Size"), b"(", b"M\xff\xff" * 100_000, b"t\x85R"),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_pickle_that_would_take_forever_or_the_process_is_refused(bomb):
    with pytest.raises(CorruptFile):
        ParsedMetadata(BOMBS[bomb], WHERE)
    with pytest.raises((CorruptFile, UntrustedItem)):
        open_pickle(BOMBS[bomb], WHERE)


@pytest.mark.parametrize(
    "value", [{(1, (2, 3)): 0}, {(0,) * 900: 0}, {1 << 5000: 0}, {(): {((),): 1}}, {"a" * 10_000: 0}]
)
def test_keys_as_people_have_them_pass(value):
    assert open_pickle(pickle.dumps(value, 2), WHERE) == value


def test_a_pickle_cannot_change_what_was_read_of_a_tensor():
    saved = io.BytesIO()
    torch.save(torch.ones(2), saved)
    with zipfile.ZipFile(saved) as archive:
        pickled = archive.read("archive/data.pkl")
    assert open_pickle(pickled, WHERE).shape == (2,)
    change = b"N}" + text("shape").replace(b"\x8c\x05", b"X\x05\0\0\0") + b"Ns\x86b."
    with pytest.raises(CorruptFile, match="changes what was read"):
        open_pickle(pickled[:-1] + change, WHERE)


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
