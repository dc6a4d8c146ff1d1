"""`ckpt_cloud.open`: a lazy mapping over a checkpoint of any format."""

import secrets

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ckpt_cloud
from ckpt_cloud.errors import (
    CheckpointNotFound,
    CkptCloudError,
    CorruptManifest,
    SliceOutOfBounds,
    UnknownKey,
    UntrustedItem,
)
from ckpt_cloud.format import pages
from tests.interop.states import same


class Odd:
    """A class that no checkpoint may bring along."""


@pytest.fixture
def url(state):
    where = f"memory://{secrets.token_hex(4)}/step-1"
    ckpt_cloud.save(state, checkpoint_id=where, no_dist=True)
    return where


def test_it_is_a_mapping(url, state):
    with ckpt_cloud.open(url) as opened:
        keys = ["big", "nested.half", "nested.transposed", "nested.list.2.deep", "empty", "scalar", "fp8"]
        assert list(opened)[:7] == keys
        assert len(opened) == 13
        assert "big" in opened
        assert "bug" not in opened
        assert opened.get("bug") is None
        assert same(opened["big"], state["big"])
        assert same(opened["nested.transposed"], state["nested"]["transposed"])
        assert same(opened["empty"], state["empty"])
        assert same(opened["scalar"], state["scalar"])
        assert same(opened["complex"], state["complex"])
        assert opened["step"] == 3
        assert opened["nested.list.1"] == "two"
        assert opened.format == "ckpt-cloud"
        assert opened.url == url
        assert repr(opened).startswith(f"<Checkpoint {url}: ckpt-cloud, 10 tensors of ")


def test_what_a_tensor_is_like_costs_no_fetch(url, state):
    opened = ckpt_cloud.open(url)
    part = opened.get_slice("big")
    assert (part.key, part.shape, part.dtype, part.nbytes) == ("big", (300, 400), torch.float32, 480_000)
    assert repr(part) == "<TensorSlice big: torch.float32, (300, 400)>"
    assert opened.tensors[0] == "big"
    assert opened.items_only == ["step", "nested.list.0", "nested.list.1"]
    assert opened.report.bytes_moved == 0


def test_a_slice_of_ours_is_verified_and_fetches_its_blocks_only():
    where = f"memory://{secrets.token_hex(4)}/step-1"
    whole = torch.randn(4000, 1000)
    ckpt_cloud.save({"w": whole}, checkpoint_id=where, no_dist=True)
    opened = ckpt_cloud.open(where)
    assert torch.equal(opened.get_slice("w")[10:20, :], whole[10:20])
    assert opened.report.bytes_moved <= 2 * 256 * 1024


def test_an_unknown_key_suggests_near_ones(url):
    opened = ckpt_cloud.open(url)
    with pytest.raises(UnknownKey, match=r"did you mean 'nested\.half'") as unknown:
        _ = opened["nested.halve"]
    assert isinstance(unknown.value, KeyError)
    assert url in str(unknown.value)
    with pytest.raises(UnknownKey, match="'step' is not a tensor"):
        opened.get_slice("step")


INDEXES = [
    np.s_[301],
    np.s_[-301],
    np.s_[0:301],
    np.s_[-301:],
    np.s_[:, 400],
    np.s_[:, 0:401],
    np.s_[0, 0, 0],
    np.s_[..., ...],
    np.s_[::-1],
    np.s_[::0],
    np.s_[None],
    np.s_["a"],
    np.s_[1.5],
    np.s_[True],
    np.s_[0:2.5],
]


@pytest.mark.parametrize("index", INDEXES, ids=str)
def test_a_slice_outside_the_tensor_names_the_key(url, index):
    part = ckpt_cloud.open(url).get_slice("big")
    with pytest.raises(SliceOutOfBounds, match=r"'big' of shape \(300, 400\) has no part") as outside:
        _ = part[index]
    assert isinstance(outside.value, IndexError)


SHAPE = (5, 4, 3)
WHOLE = torch.arange(60.0).view(SHAPE)


@st.composite
def indexes(draw):
    def side(size):
        start, stop = sorted(draw(st.integers(-size, size)) % (size + 1) for _ in range(2))
        return draw(st.sampled_from([slice(start, stop, draw(st.integers(1, 3))), slice(None), slice(start, None)]))

    sides = [draw(st.integers(-size, size - 1)) if draw(st.booleans()) else side(size) for size in SHAPE]
    first = draw(st.integers(0, 3))
    if draw(st.booleans()):
        last = draw(st.integers(0, 3 - first))
        return (*sides[:first], ..., *sides[3 - last :])
    return tuple(sides[:first])


@pytest.fixture(scope="module")
def cube():
    where = f"memory://{secrets.token_hex(4)}/step-1"
    ckpt_cloud.save({"cube": WHOLE}, checkpoint_id=where, no_dist=True)
    return ckpt_cloud.open(where).get_slice("cube")


@given(index=indexes())
def test_indexing_is_torchs(cube, index):
    assert torch.equal(cube[index], WHOLE[index])


def test_numpys_integers_index_too(cube):
    one, three = np.int64(1), np.uint8(3)
    assert torch.equal(cube[one, one:three], WHOLE[1, 1:3])


def test_an_item_that_could_run_code_is_refused(tmp_path):
    where = f"file://{tmp_path}/step-1"
    ckpt_cloud.save({"a": torch.zeros(3), "odd": Odd()}, checkpoint_id=where, no_dist=True)
    opened = ckpt_cloud.open(where)
    assert opened["a"].eq(0).all()
    with pytest.raises(UntrustedItem, match="'odd'"):
        _ = opened["odd"]
    assert isinstance(ckpt_cloud.open(where, trust=True)["odd"], Odd)


def test_places_with_nothing(tmp_path):
    for where in (f"file://{tmp_path}/none", f"memory://{secrets.token_hex(4)}/none"):
        with pytest.raises(CheckpointNotFound):
            ckpt_cloud.open(where)


def test_a_wrong_option_is_told_at_once():
    with pytest.raises(CkptCloudError, match="unknown option 'ragion'"):
        ckpt_cloud.open("s3://bucket/run", ragion="x")


def test_known_keys_need_a_few_pages_of_a_large_manifest(monkeypatch, store_faults):
    monkeypatch.setattr(pages, "PAGE_BYTES", 2000)
    where = f"memory://{secrets.token_hex(4)}/step-1"
    state = {f"w{n}": torch.full((3,), float(n)) for n in range(400)} | {f"s{n}": n for n in range(400)}
    ckpt_cloud.save(state | {"big": ["x" * 100_000]}, checkpoint_id=where, no_dist=True)
    store_faults.clear()

    opened = ckpt_cloud.open(where, keys=["w123", "s7", "big", "missing"])

    asked = [call.operation for call in store_faults.operations if call.key.endswith("/manifest")]
    assert set(asked) == {"get_range"}
    assert len(asked) <= 1 + 4, "the root, a page each, and one of objects"
    assert sorted(opened) == ["big", "s7", "w123"]
    assert same(opened["w123"], state["w123"])
    assert (opened["s7"], opened["big"]) == (7, ["x" * 100_000])
    with pytest.raises(UnknownKey):
        opened["w124"]


def test_keys_of_a_manifest_in_one_piece_and_of_another_format(tmp_path):
    torch.save({"w": torch.ones(2), "v": torch.zeros(2)}, tmp_path / "state.pt")
    opened = ckpt_cloud.open(tmp_path / "state.pt", keys=["w"])
    assert list(opened) == ["w"]


@pytest.mark.parametrize("damaged", ["root", "page"])
def test_a_damaged_manifest_is_never_believed(monkeypatch, store_faults, damaged):
    monkeypatch.setattr(pages, "PAGE_BYTES", 2000)
    where = f"memory://{secrets.token_hex(4)}/step-1"
    ckpt_cloud.save({f"w{n}": torch.ones(3) for n in range(400)}, checkpoint_id=where, no_dist=True)
    store_faults.corrupt("*/manifest", times=1, after=0 if damaged == "root" else 1)
    assert same(ckpt_cloud.open(where, keys=["w5"])["w5"], torch.ones(3)), "damage on the way is read again"
    store_faults.corrupt("*/manifest", after=0 if damaged == "root" else 1)
    with pytest.raises(CorruptManifest):
        ckpt_cloud.open(where, keys=["w5"])
