"""Items: plain values always pass and come back equal; what could do anything is refused before it is opened."""

import collections
import io
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ckpt_cloud
from ckpt_cloud import ObjectStoreReader
from ckpt_cloud.errors import UntrustedItem
from ckpt_cloud.format.pickles import is_plain, rebuilt, records
from ckpt_cloud.items import screened

floats = st.floats() | st.complex_numbers() | st.floats(width=32).map(np.float32) | st.floats().map(np.float64)
others = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**3000), 2**3000)
    | st.text(st.characters(categories=None))
    | st.binary()
    | st.integers(-(2**63), 2**63 - 1).map(np.int64)
    | st.booleans().map(np.bool_)
    | st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=5).map(np.str_)
    | st.lists(st.integers(0, 2**40), max_size=4).map(torch.Size)
    | st.sampled_from([torch.float32, torch.bfloat16, torch.int64])
)
scalars = others | floats
# No NaN: it hashes by its identity, so that a set of two comes in another order each time.
keys = st.recursive(
    others | floats.filter(lambda value: value == value),
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=5,
)
values = st.recursive(
    scalars | st.binary().map(bytearray) | st.sets(keys, max_size=3) | st.frozensets(keys, max_size=3),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(keys, inner, max_size=4)
        | st.dictionaries(keys, inner, max_size=4).map(collections.OrderedDict)
    ),
    max_leaves=20,
)


def saved(value, **options):
    out = io.BytesIO()
    torch.save(value, out, **options)
    return out.getvalue()


def archive(pickled, **more):
    """A `torch.save` archive around a pickle of the attacker's choice."""
    found = records(saved(0)) | {"data.pkl": pickled} | more
    return rebuilt(found)


def opened(data):
    """As DCP's planner does."""
    return torch.load(io.BytesIO(data), weights_only=False)


@given(values)
def test_plain_values_pass_without_torchs_list_and_come_back(value):
    data = saved(value)
    assert is_plain(records(data)["data.pkl"])
    loaded = opened(screened("value", data))
    assert type(loaded) is type(value)
    # By their pickles, since NaN is not equal to itself.
    assert pickle.dumps(loaded, 2) == pickle.dumps(opened(data), 2)


@pytest.mark.parametrize(
    "value",
    [
        (torch.arange(4), "in a tuple"),
        {"p": torch.nn.Parameter(torch.ones(2))},
        torch.device("cpu"),
        collections.Counter("aab"),
        [torch.eye(3).to_sparse(), torch.ones(2, dtype=torch.bfloat16)],
    ],
    ids=["tuple", "parameter", "device", "counter", "sparse"],
)
def test_what_torch_allows_passes_too(value):
    assert type(opened(screened("value", saved(value)))) is type(value)


SPRUNG = []


def spring(*_):
    SPRUNG.append(1)


class Trap:
    def __reduce__(self):
        return spring, ()


class Allowed:
    def __init__(self):
        self.x = 1


def refusal(data, said):
    with pytest.raises(UntrustedItem, match=said) as refused:
        screened("the item", data)
    assert "'the item'" in str(refused.value)
    assert "trust=True" in refused.value.hint
    assert SPRUNG == []


def test_a_type_that_is_not_plain_is_named_and_can_be_allowed():
    data = saved({"a": Allowed()})
    refusal(data, "Allowed")
    with torch.serialization.safe_globals([Allowed]):
        assert opened(screened("a", data))["a"].x == 1


def zipped(data, **options):
    """The same records, zipped otherwise."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", **options) as again:
        for name, content in records(data).items():
            again.writestr(f"archive/{name}", content)
    return out.getvalue()


def with_record(name, content):
    out = io.BytesIO(saved(0))
    with zipfile.ZipFile(out, "a") as again:
        again.writestr(name, content)
    return out.getvalue()


def torch_script():
    out = io.BytesIO()
    torch.jit.save(torch.jit.trace(torch.nn.Linear(1, 1), torch.ones(1)), out)
    return out.getvalue()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        pytest.param(lambda: saved(Trap()), "spring", id="trap"),
        pytest.param(lambda: saved([{("k",): (Trap(),)}]), "spring", id="hidden-trap"),
        pytest.param(lambda: pickle.dumps(Trap()), "archive", id="bare-pickle"),
        pytest.param(lambda: saved(1, _use_new_zipfile_serialization=False), "archive", id="older-form"),
        pytest.param(lambda: saved(1, pickle_protocol=4), "protocol 2", id="other-protocol"),
        pytest.param(lambda: zipped(saved([0] * 10**6), compression=zipfile.ZIP_DEFLATED), "compressed", id="zip-bomb"),
        pytest.param(
            lambda: with_record("archive/constants.pkl", b"\x80\x02N."), "constants.pkl", id="torchscript-mark"
        ),
        pytest.param(lambda: with_record("archive/data.pkl", b"\x80\x02N."), "archive", id="doubled-record"),
        pytest.param(lambda: with_record("other/data/0", b""), "archive", id="two-directories"),
        pytest.param(lambda: archive(b"\x80\x02N.", version=b"x"), "archive", id="version"),
        pytest.param(lambda: rebuilt({"data.pkl": b"\x80\x02N."}), "archive", id="no-version"),
        pytest.param(lambda: archive(b"\x80\x02N.", byteorder=b"middle"), "archive", id="byte-order"),
        pytest.param(lambda: b"", "archive", id="empty"),
        pytest.param(lambda: saved(1)[:-10], "archive", id="cut-off"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_archives_that_are_refused(data, said):
    SPRUNG.clear()
    refusal(data(), said)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_is_refused():
    refusal(torch_script(), "archive")


def bomb(levels):
    """A tuple of two of a tuple of two of ..., as a key: hashing it takes 2**levels steps."""
    key = b")" + b"q\x00h\x00\x86" * levels
    return b"\x80\x02}" + key + b"Ns."


def words(text):
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def number(value):
    return b"\x8a\x07" + value.to_bytes(7, "little")


def spread(size, kind="FloatStorage"):
    """A tensor of one element that is shown `size` times."""
    storage = b"(" + words("storage") + f"ctorch\n{kind}\n".encode() + words("0") + words("cpu") + b"K\1tQ"
    rest = b"K\0" + number(size) + b"\x85K\0\x85\x89ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest + b"tR"


HUGE = 1 << 36
TO_DEVICE = b"ctorch._utils\n_rebuild_device_tensor_from_cpu_tensor\n"
QUANTIZED = (
    b"ctorch._utils\n_rebuild_qtensor\n(NK\0K\1\x85K\1\x85(ctorch\nper_channel_affine\n%sK\0t\x89ccollections\n"
    b"OrderedDict\n)RtR."
)
COPIES = {
    "to another type": TO_DEVICE + b"(" + spread(HUGE) + b"ctorch\nfloat64\n" + words("cpu") + b"\x89tR.",
    "by a detour": b"ctorch._tensor\n_rebuild_from_type_v2\n("
    + TO_DEVICE
    + b"ctorch\nTensor\n("
    + spread(HUGE)
    + b"ctorch\nfloat64\n"
    + words("cpu")
    + b"\x89t}tR.",
    "made by a detour": TO_DEVICE
    + b"(ctorch._tensor\n_rebuild_from_type_v2\n(ctorch._utils\n_rebuild_tensor_v2\nctorch\nTensor\n"
    + spread(HUGE).partition(b"v2\n")[2][:-1]
    + b"}tR"
    + b"ctorch\nfloat64\n"
    + words("cpu")
    + b"\x89tR.",
    "as a parameter first": TO_DEVICE
    + b"(ctorch._utils\n_rebuild_parameter\n("
    + spread(HUGE)
    + b"\x89ccollections\nOrderedDict\n)RtR"
    + b"ctorch\nfloat64\n"
    + words("cpu")
    + b"\x89tR.",
    "often": b"]("
    + spread(1 << 22)
    + b"q\1"
    + (TO_DEVICE + b"(h\1ctorch\nfloat64\n" + words("cpu") + b"\x89tR") * 100
    + b"e.",
    "scales": QUANTIZED % (spread(HUGE) * 2),
    "lists of scales": QUANTIZED % ((b"](" + spread(HUGE) + b"e") * 2),
    "a list that is filled later": QUANTIZED % (b"]q\1\x85h\1(" + spread(HUGE) + b"e"),
    "values of a dict": QUANTIZED % (b"}" + words("a") + spread(HUGE) + b"sN"),
    "a state": spread(1) + spread(HUGE) + b"\x85b.",
    "a new object": b"ctorch.nn.parameter\nParameter\n" + spread(HUGE) + b"\x85\x81.",
    "of no size that is told": TO_DEVICE
    + b"("
    + spread(HUGE).replace(number(HUGE) + b"\x85", b"ctorch\nSize\n" + number(HUGE) + b"\x85\x85R")
    + b"ctorch\nfloat64\n"
    + words("cpu")
    + b"\x89tR.",
}


@pytest.mark.parametrize("pickled", COPIES.values(), ids=COPIES)
def test_a_tensor_of_one_element_is_not_copied_endlessly_often(pickled):
    refusal(archive(b"\x80\x02" + pickled, **{"data/0": bytes(4)}), "more elements than are stored|holds itself")


def test_a_tensor_that_shows_an_element_often_is_as_good_as_another():
    value = {"mask": (torch.ones(1).expand(1 << 40), torch.nn.Parameter(torch.ones(1).expand(1000)))}
    assert opened(screened("mask", saved(value)))["mask"][0].shape == (1 << 40,)


@pytest.mark.parametrize(
    ("pickled", "said"),
    [
        pytest.param(b"\x80\x02c__builtin__\nbytearray\n\x8a\x05\0\0\0\0\x40\x85R.", "bytearray", id="4-TiB-of-zeros"),
        pytest.param(b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\x40\x85R.", "bytearray", id="by-its-other-name"),
        pytest.param(b"\x80\x02c__builtin__\nbytearray\n\x8a\x05\0\0\0\0\x40\x85\x81.", "bytearray", id="by-new"),
        pytest.param(b"\x80\x02ctorch\nTensor\n\x8a\x05\0\0\0\0\x40\x85R.", "torch.Tensor", id="huge-tensor"),
        pytest.param(
            b"\x80\x02ctorch.storage\nUntypedStorage\n\x8a\x05\0\0\0\0\x40\x85R.", "Storage", id="huge-storage"
        ),
        pytest.param(
            b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(c__builtin__\nbytearray\nctorch\nTensor\n"
            b"\x8a\x05\0\0\0\0\x40\x85}tR.",
            "_rebuild_from_type_v2",
            id="huge-by-detour",
        ),
        pytest.param(b"\x80\x02c_codecs\nencode\nX\1\0\0\0aX\4\0\0\0idna\x86R.", "encode", id="slow-encoding"),
        pytest.param(b"\x80\x02c__builtin__\nset\n)\x81K\0b.", "not made by a call", id="set-by-new"),
        pytest.param(b"\x80\x02cbuiltins\nset\n)\x81)b.", "not made by a call", id="set-by-its-other-name"),
        pytest.param(bomb(100), "forever", id="slow-hash"),
        pytest.param(
            b"\x80\x02}(" + b")" + b"q\0h\0\x86" * 20 + b"q\1N" + b"h\1N" * 100 + b"u.", "forever", id="slow-hashes"
        ),
        pytest.param(
            b"\x80\x02]" + b")" + b"q\0h\0\x86" * 20 + b"q\1a" + b"c__builtin__\nset\n](h\1e\x85Ra" * 100 + b".",
            "forever",
            id="slow-sets",
        ),
        pytest.param(b"\x80\x02}" + b")" + b"\x85" * 100_000 + b"Ns.", "deep", id="deep-hash"),
        pytest.param(b"\x80\x02}]Ns.", "damaged", id="unhashable-key"),
        pytest.param(b"\x80\x02h\x07.", "damaged", id="no-such-memo"),
        pytest.param(b"\x80\x02.", "damaged", id="nothing"),
        pytest.param(b"\x80\x02NN.", "damaged", id="left-over"),
        pytest.param(b"\x80\x02X\xff\xff\xff\xffa.", "damaged", id="lying-length"),
        pytest.param(b"\x80\x02cos\nsystem\nX\2\0\0\0ls\x85R.", "system", id="os-system"),
        pytest.param(b"\x80\x02ios\nsystem\n.", "INST", id="inst"),
        pytest.param(b"\x80\x02X\2\0\0\0osX\6\0\0\0system\x93.", "STACK_GLOBAL", id="stack-global"),
        pytest.param(b"\x80\x02\x82\x01.", "EXT1", id="extension"),
        pytest.param(b"\x80\x02ctorch\n\\x53ize\n)\x85R.", "x53ize", id="escaped-name"),
        pytest.param(b"\x80\x02ctorch\nstorage.os.system\n)\x85R.", "malformed", id="dotted-name"),
        pytest.param(b"\x80\x02cnumpy\ndtype\nX\2\0\0\0O8\x89\x88\x87R.", "numpy.dtype", id="object-dtype"),
    ],
)
def test_pickles_that_are_refused(pickled, said):
    refusal(archive(pickled), said)


def test_nothing_of_a_refused_checkpoint_reaches_the_planner(tmp_path):
    url = str(tmp_path / "run")
    ckpt_cloud.save({"fine": 1, "trap": Trap(), "w": torch.ones(2)}, checkpoint_id=url)
    SPRUNG.clear()
    state = {"fine": 0, "trap": None, "w": torch.zeros(2)}
    with pytest.raises(UntrustedItem, match=r"'trap'.*spring"):
        ckpt_cloud.load(state, checkpoint_id=url)
    assert SPRUNG == []
    assert state["fine"] == 0


def test_plain_values_of_a_state_load_without_trust(tmp_path):
    state = {
        "step": 10**400,
        "name": "ø\ud800",
        "empty": b"",
        "loss": np.float64(0.25),
        "seen": {1, (2, b"x")},
        "nested": {"a": [1, (None, True, 1j)]},
        "size": torch.Size([2, 3]),
    }
    ckpt_cloud.save(state, checkpoint_id=tmp_path / "run")
    loaded = {"nested": {"a": None}} | dict.fromkeys([key for key in state if key != "nested"])
    ckpt_cloud.load(loaded, storage_reader=ObjectStoreReader(tmp_path / "run"))
    assert loaded == state
    assert isinstance(loaded["loss"], np.float64)
    assert list(Path(tmp_path / "run").glob("data/*/manifest"))
