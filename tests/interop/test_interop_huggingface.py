"""Hugging Face repositories, saved by DCP from any number of ranks, and consolidated by the store."""

import importlib
import json
import secrets
from pathlib import Path

import boto3
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import ckpt_cloud
from ckpt_cloud import ForeignReader, HuggingFaceWriter
from ckpt_cloud.errors import (
    CheckpointChanged,
    CheckpointExists,
    InvalidOption,
    PermissionDenied,
    UnknownKey,
    UnsupportedTensor,
)
from ckpt_cloud.interop.consolidate import plan_parts
from ckpt_cloud.stores.compose import Copied
from tests.dcp import ranks
from tests.interop import hf_cases
from tests.interop.states import same

MIB = 1 << 20
convert_room = importlib.import_module("ckpt_cloud.interop.convert")
WHOLES = hf_cases.WHOLES


@pytest.fixture(autouse=True)
def one_thread_for_each_rank(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def load_repository(path):
    found = {}
    for file in Path(path).glob("*.safetensors"):
        found |= load_file(file)
    return found


def test_from_four_ranks_to_three(tmp_path):
    url = f"file://{tmp_path}/repo"
    ranks.run(
        4,
        hf_cases.save_sharded,
        tmp_path,
        url,
        {"fqn_to_index_mapping": {"rows": 1, "columns": 2, "both": 1, "scalar": 2}},
    )
    names = sorted(path.name for path in (tmp_path / "repo").iterdir() if path.is_file())
    assert names == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    assert same(dict(sorted(load_repository(tmp_path / "repo").items())), dict(sorted(WHOLES.items())))
    assert all(ranks.run(3, hf_cases.load_sharded, tmp_path, url))


@pytest.mark.slow
def test_shards_that_are_left_as_they_are(tmp_path):
    url = f"file://{tmp_path}/repo"
    ranks.run(2, hf_cases.save_sharded, tmp_path, url, {"consolidate": False})
    assert len(list((tmp_path / "repo").glob("shard-*.safetensors"))) == 2
    assert all(ranks.run(3, hf_cases.load_sharded, tmp_path, url))
    ckpt_cloud.convert(url, tmp_path / "whole", to="safetensors")
    assert same(dict(sorted(load_repository(tmp_path / "whole").items())), dict(sorted(WHOLES.items())))


def test_from_one_process(tmp_path):
    writer = HuggingFaceWriter(f"file://{tmp_path}/repo", max_shard_bytes=5000)
    dcp.save(dict(WHOLES), storage_writer=writer, no_dist=True)
    index = json.loads((tmp_path / "repo" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == WHOLES.keys()
    assert same(dict(sorted(load_repository(tmp_path / "repo").items())), dict(sorted(WHOLES.items())))
    assert not (tmp_path / "repo" / "sharded").exists()


def test_stock_reader_opens_it(tmp_path):
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    dcp.save(dict(WHOLES), storage_writer=HuggingFaceWriter(f"file://{tmp_path}/repo"), no_dist=True)
    got = {name: torch.zeros_like(value) for name, value in WHOLES.items()}
    dcp.load(got, storage_reader=HuggingFaceStorageReader(str(tmp_path / "repo")), no_dist=True)
    assert same(got, WHOLES)


@pytest.fixture
def bucket_url(moto_server, monkeypatch, nobodys_cloud):
    for name, value in moto_server.env.items():
        monkeypatch.setenv(name, value)
    bucket = f"bucket-{secrets.token_hex(4)}"
    moto_server.create_bucket(bucket)
    return f"s3://{bucket}/repo"


def keys(url):
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    listed = boto3.session.Session().client("s3").list_objects_v2(Bucket=bucket, Prefix=prefix)
    return sorted(entry["Key"] for entry in listed["Contents"])


def test_s3_copies_on_its_own_side(bucket_url):
    state = {"big": torch.randn(3, MIB), "bigger": torch.randn(5, MIB), "small": torch.randn(7)}
    writer = HuggingFaceWriter(bucket_url)
    dcp.save(dict(state), storage_writer=writer, no_dist=True)
    # All but what fills up a first part of 5 MiB goes without us.
    assert writer.copied_bytes >= 32 * MIB - 6 * MIB
    assert keys(bucket_url) == ["repo/model.safetensors"]
    got = {name: torch.zeros_like(value) for name, value in state.items()}
    dcp.load(got, storage_reader=ForeignReader(bucket_url), no_dist=True)
    assert same(got, state)
    uploads = boto3.session.Session().client("s3").list_multipart_uploads(Bucket=bucket_url.split("/")[2])
    assert "Uploads" not in uploads


def test_shards_that_were_left_are_put_together_by_s3_later(bucket_url):
    """As `consolidate_safetensors_files`, into another place of the bucket."""
    state = {"big": torch.randn(3, MIB), "small": torch.randn(7), "bigger": torch.randn(5, MIB)}
    dcp.save(dict(state), storage_writer=HuggingFaceWriter(bucket_url, consolidate=False), no_dist=True)
    done = ckpt_cloud.convert(bucket_url, f"{bucket_url}/whole", to="safetensors", max_shard_bytes=25 * MIB)
    assert done.bytes_copied >= 32 * MIB - 11 * MIB
    assert done.bytes_read < 12 * MIB
    assert done.objects == len(keys(f"{bucket_url}/whole"))
    assert same(dict(ckpt_cloud.open(f"{bucket_url}/whole")), state)
    one_file = ckpt_cloud.convert(f"{bucket_url}/whole", f"{bucket_url}/x.safetensors", to="safetensors")
    assert one_file.bytes_copied > 0
    assert same(dict(ckpt_cloud.open(f"{bucket_url}/x.safetensors")), state)


def test_a_shard_that_is_replaced_meanwhile_is_not_copied(bucket_url, monkeypatch):
    state = {"big": torch.randn(3, MIB), "bigger": torch.randn(5, MIB)}
    dcp.save(dict(state), storage_writer=HuggingFaceWriter(bucket_url, consolidate=False), no_dist=True)
    ask, (key,) = convert_room.open_composer, keys(bucket_url)

    def after_a_replacement(*told):
        client = boto3.session.Session().client("s3")
        bucket = bucket_url.split("/")[2]
        body = client.get_object(Bucket=bucket, Key=key)["Body"].read()
        client.put_object(Bucket=bucket, Key=key, Body=body[:-1] + bytes([body[-1] ^ 1]))
        return ask(*told)

    monkeypatch.setattr(convert_room, "open_composer", after_a_replacement)
    with pytest.raises(CheckpointChanged):
        ckpt_cloud.convert(bucket_url, f"{bucket_url}/whole", to="safetensors")
    assert keys(f"{bucket_url}/") == [key]


def test_small_tensors_on_s3(bucket_url):
    dcp.save(dict(WHOLES), storage_writer=HuggingFaceWriter(bucket_url), no_dist=True)
    assert same(dict(sorted(dict(ckpt_cloud.open(bucket_url)).items())), dict(sorted(WHOLES.items())))


def test_what_is_there_is_kept(tmp_path):
    url = f"file://{tmp_path}/repo"
    dcp.save({"a": torch.ones(3)}, storage_writer=HuggingFaceWriter(url), no_dist=True)
    with pytest.raises(CheckpointExists, match=r"model\.safetensors"):
        ckpt_cloud.save({"a": torch.zeros(3)}, storage_writer=HuggingFaceWriter(url), no_dist=True)
    assert ckpt_cloud.open(url)["a"].eq(1).all()
    ckpt_cloud.save({"a": torch.zeros(3)}, storage_writer=HuggingFaceWriter(url, overwrite=True), no_dist=True)
    assert ckpt_cloud.open(url)["a"].eq(0).all()


@pytest.mark.parametrize(("old", "new"), [(1, 10**6), (10**6, 1), (1, 60), (1, 1)])
def test_a_replaced_repository_leaves_no_files(tmp_path, old, new):
    url, fresh = f"file://{tmp_path}/repo", f"file://{tmp_path}/fresh"
    first = {f"{n}": torch.full((5,), n) for n in range(4)}
    second = {f"{n}": torch.full((5,), 10 + n) for n in range(1, 5)}
    dcp.save(first, storage_writer=HuggingFaceWriter(url, max_shard_bytes=old), no_dist=True)
    dcp.save(second, storage_writer=HuggingFaceWriter(url, max_shard_bytes=new, overwrite=True), no_dist=True)
    dcp.save(second, storage_writer=HuggingFaceWriter(fresh, max_shard_bytes=new), no_dist=True)
    assert sorted(path.name for path in (tmp_path / "repo").iterdir()) == sorted(
        path.name for path in (tmp_path / "fresh").iterdir()
    )
    assert same(dict(ckpt_cloud.open(url)), second)


def test_a_save_that_fails_keeps_the_repository_that_it_would_replace(tmp_path, store_faults):
    url = f"file://{tmp_path}/repo"
    dcp.save({"a": torch.ones(3)}, storage_writer=HuggingFaceWriter(url), no_dist=True)
    store_faults.fail("put", "*shard*", PermissionDenied)
    with pytest.raises(PermissionDenied):
        ckpt_cloud.save({"a": torch.zeros(3)}, storage_writer=HuggingFaceWriter(url, overwrite=True), no_dist=True)
    assert ckpt_cloud.open(url)["a"].eq(1).all()


def test_shards_that_were_left_are_replaced_and_never_mixed_with_others(tmp_path):
    url = f"file://{tmp_path}/repo"
    dcp.save({"a": torch.ones(3)}, storage_writer=HuggingFaceWriter(url, consolidate=False), no_dist=True)
    for consolidate in (True, False):
        with pytest.raises(CheckpointExists, match="shard-00001"):
            ckpt_cloud.save({"b": torch.ones(3)}, storage_writer=HuggingFaceWriter(url, consolidate=consolidate))
        writer = HuggingFaceWriter(url, consolidate=consolidate, overwrite=True)
        dcp.save({"b": torch.ones(3)}, storage_writer=writer, no_dist=True)
        assert list(ckpt_cloud.open(url)) == ["b"]
        dcp.save({"a": torch.ones(3)}, storage_writer=HuggingFaceWriter(url, consolidate=False, overwrite=True))
        assert list(ckpt_cloud.open(url)) == ["a"]


def test_what_cannot_be_split_is_told_at_once(tmp_path):
    with pytest.raises(InvalidOption, match="max_shard_bytes is 0"):
        HuggingFaceWriter(f"file://{tmp_path}/repo", max_shard_bytes=0)
    with pytest.raises(InvalidOption, match="from 1"):
        HuggingFaceWriter(f"file://{tmp_path}/repo", fqn_to_index_mapping={"a": 0})


def test_what_safetensors_cannot_hold_is_named(tmp_path):
    writer = HuggingFaceWriter(f"file://{tmp_path}/repo")
    with pytest.raises(UnsupportedTensor, match="'step' is no tensor"):
        ckpt_cloud.save({"a": torch.ones(3), "step": 3}, storage_writer=writer, no_dist=True)
    with pytest.raises(UnsupportedTensor, match="complex128, which 'z'"):
        ckpt_cloud.save({"z": torch.zeros(3, dtype=torch.complex128)}, storage_writer=writer, no_dist=True)
    with pytest.raises(UnsupportedTensor, match="__metadata__"):
        ckpt_cloud.save({"__metadata__": torch.ones(3)}, storage_writer=writer, no_dist=True)


def test_a_mapping_without_a_key(tmp_path):
    writer = HuggingFaceWriter(f"file://{tmp_path}/repo", fqn_to_index_mapping={"a": 1})
    with pytest.raises(UnknownKey, match="'b'"):
        ckpt_cloud.save({"a": torch.ones(3), "b": torch.ones(3)}, storage_writer=writer, no_dist=True)
    assert list(tmp_path.rglob("*.safetensors")) == []


def nbytes(part):
    spans = [part] if isinstance(part, Copied) else part
    return sum(len(each) if isinstance(each, bytes) else each.end - each.start for each in spans)


def flat(parts):
    return [span for part in parts for span in ([part] if isinstance(part, Copied) else part)]


SPANS = st.lists(st.binary(max_size=12) | st.integers(0, 60), max_size=12)


@given(SPANS)
def test_parts_are_large_enough_and_nothing_is_lost_or_moved(told):
    found, at = [], 0
    for each in told:
        if isinstance(each, bytes):
            found.append(each)
        else:
            found.append(Copied("k", at, at + each))
            at += each
    parts = plan_parts(iter(found), least=10)
    assert all(nbytes(part) >= 10 for part in parts[:-1])

    def content(spans):
        return b"".join(
            span if isinstance(span, bytes) else bytes(n % 251 for n in range(span.start, span.end)) for span in spans
        )

    assert content(flat(parts)) == content(found)
