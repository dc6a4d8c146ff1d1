"""Ids whose text order is time order, and keys that lead nowhere but into the checkpoint."""

import hashlib
import re
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_cloud.errors import CorruptManifest
from ckpt_cloud.format.layout import (
    COMMIT_KEY,
    NO_ID,
    check_key,
    id_unix_ms,
    is_id,
    join,
    manifest_key,
    mint_id,
    pack_key,
    rank_path,
)

ID = "0190b5c4f00e7abc8def0123456789ab"
MILLISECONDS = st.integers(0, 2**48 - 1)
CHANCE = st.binary(min_size=10, max_size=10)


@given(MILLISECONDS, CHANCE)
def test_id_is_a_uuid7_that_keeps_its_time_and_chance(unix_ms, chance):
    minted = mint_id(unix_ms, chance)

    assert is_id(minted)
    assert id_unix_ms(minted) == unix_ms
    as_uuid = uuid.UUID(hex=minted)
    assert (as_uuid.version, as_uuid.variant) == (7, uuid.RFC_4122)
    kept = (as_uuid.int >> 64 & 0xFFF) << 62 | as_uuid.int & (1 << 62) - 1
    assert kept == int.from_bytes(chance, "big") & (1 << 74) - 1


@given(st.lists(st.tuples(MILLISECONDS, CHANCE), min_size=2))
def test_text_order_is_time_order(mints):
    by_text = sorted(mint_id(*mint) for mint in mints)
    assert [id_unix_ms(minted) for minted in by_text] == sorted(unix_ms for unix_ms, _ in mints)
    assert min(by_text) > NO_ID


@pytest.mark.parametrize("text", ["", ID[:-1], ID + "0", ID.upper(), f"{ID}\n", f" {ID[1:]}", "g" * 32, "\u0663" * 32])
def test_not_an_id(text):
    assert not is_id(text)


@given(MILLISECONDS, CHANCE, st.integers(0, 999_999_999))
def test_keys_that_we_make_pass(unix_ms, chance, number):
    minted = mint_id(unix_ms, chance)
    packs = [pack_key(minted, number, spread=digits) for digits in range(5)]
    assert len(set(packs)) == 5
    for key in (*packs, manifest_key(minted)):
        assert check_key(key) == key


def test_spreading_puts_the_hash_of_each_object_before_its_id():
    assert pack_key(ID, 7) == f"data/{ID}/7.safetensors"
    digits = hashlib.sha256(f"{ID}/7".encode()).hexdigest()
    for spread in range(1, 5):
        assert pack_key(ID, 7, spread=spread) == f"data/{digits[:spread]}-{ID}/7.safetensors"
    prefixes = [pack_key(ID, number, spread=1)[len("data/")] for number in range(1600)]
    assert all(60 < prefixes.count(digit) < 140 for digit in "0123456789abcdef")


@pytest.mark.parametrize(
    "key",
    [
        "",
        ".",
        "..",
        "../x",
        "/etc/passwd",
        "s3://other/x",
        "..%2f",
        "\0",
        COMMIT_KEY,
        f"/data/{ID}/manifest",
        f"data/{ID}/",
        f"data/{ID}",
        f"data//{ID}/manifest",
        f"data/{ID}/../{ID}/manifest",
        f"data/{ID}/..%2f..%2fmanifest",
        f"data/{ID}/manifest\n",
        f"data/{ID}/manifest\0",
        f"data/{ID}/manifest/",
        f"data/{ID}/1.safetensors?versionId=x",
        f"data/{ID}/1.safetensors#",
        f"data/{ID}/-1.safetensors",
        f"data/a-{ID}/manifest",
        f"data/-{ID}/1.safetensors",
        f"data/abcde-{ID}/1.safetensors",
        f"data/g-{ID}/1.safetensors",
        f"data/a-b-{ID}/1.safetensors",
        f"data/a/{ID}/1.safetensors",
        f"data/{ID}/.safetensors",
        f"data/{ID}/1safetensors",
        f"data/{ID}/1234567890.safetensors",
        f"data/{ID}/\u0661.safetensors",
        f"data/{ID.upper()}/manifest",
        f"data\\{ID}\\manifest",
        f"rank-00001/data/{ID}/manifest",
        f"\ndata/{ID}/manifest",
    ],
)
def test_key_refused(key):
    with pytest.raises(CorruptManifest):
        check_key(key)


likely_keys = st.lists(
    st.sampled_from(["data", "/", ID, "manifest", "12.safetensors", "..", ".", "0", "\n", "\0", "%2f", "ü", "\\"]),
    max_size=8,
).map("".join)


@given(st.text(max_size=60) | likely_keys)
def test_accepted_keys_are_three_plain_segments(key):
    try:
        check_key(key)
    except CorruptManifest:
        return
    data, id_, name = key.split("/")
    assert data == "data"
    assert is_id(id_)
    assert name == "manifest" or re.fullmatch(r"[0-9]+\.safetensors", name)


def test_join_and_rank_path():
    assert join("", "a") == "a"
    assert join("p/q", "a/b") == "p/q/a/b"
    assert [rank_path(rank) for rank in (0, 12, 99_999)] == ["rank-00000", "rank-00012", "rank-99999"]
