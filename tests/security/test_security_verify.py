"""`verify`: a whole checkpoint is called whole; whatever is missing, short or altered is named, with its place."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import crc32c
import msgspec
import pytest
import torch
from torch.distributed import checkpoint as dcp

import ckpt_cloud
from ckpt_cloud import ObjectStoreWriter, TransferOptions
from ckpt_cloud.errors import CheckpointDeleted, CheckpointNotFound, CorruptCommit, CorruptManifest, StateMismatch
from ckpt_cloud.format import manifest as manifests
from ckpt_cloud.format.layout import manifest_key
from ckpt_cloud.format.register import Register, encode
from ckpt_cloud.stores.native import NativeStore
from tests import forge

MIB = 1 << 20
SMALL = TransferOptions(block_size=4096, range_size=64 << 10, pack_size=5 * MIB, part_size=5 * MIB, max_requests=3)


@pytest.fixture
def url(tmp_path):
    state = {name: torch.arange(2 * MIB, dtype=torch.int32) for name in "acd"} | {"b": torch.ones(3), "n": 7}
    writer = ObjectStoreWriter(tmp_path / "run", transfer=SMALL)
    ckpt_cloud.save(state, storage_writer=writer)
    return writer.checkpoint_id


def objects(url):
    return sorted(Path(url.removeprefix("file://")).glob("data/*/*.safetensors"))


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 0x40
    path.write_bytes(data)


@pytest.mark.parametrize("deep", [False, True])
def test_a_whole_checkpoint(url, deep):
    found = ckpt_cloud.verify(url, deep=deep, transfer=SMALL)
    assert found.ok
    assert (found.faults, found.rewritten) == ([], [])
    assert found.size_bytes == sum(path.stat().st_size for path in objects(url))
    assert found.bytes_read == (found.size_bytes if deep else 0)
    assert found.objects == len(objects(url)) > 1


def test_every_altered_block_is_found_with_its_place(url):
    path = objects(url)[0]
    for at in (5 * 4096, 5 * 4096 + 1, 6 * 4096, 300 * 4096 + 17):
        flip(path, at)
    found = ckpt_cloud.verify(url, deep=True, transfer=SMALL)
    assert not found.ok
    places = sorted((fault.start, fault.end) for fault in found.faults)
    assert places == [(5 * 4096, 7 * 4096), (300 * 4096, 301 * 4096)]
    assert {fault.key.rpartition("/")[2] for fault in found.faults} == {path.name}


def test_sizes_tell_without_reading(url):
    gone, short, *_ = objects(url)
    gone.unlink()
    short.write_bytes(short.read_bytes()[:-1])
    found = ckpt_cloud.verify(url)
    said = {fault.key.rpartition("/")[2]: fault.message for fault in found.faults}
    assert said[gone.name] == "the object is gone"
    assert "should have" in said[short.name]
    deep = ckpt_cloud.verify(url, deep=True, transfer=SMALL)
    assert len(deep.faults) == 2
    assert 0 < deep.bytes_read < found.size_bytes


def test_an_object_written_again_is_told_from_the_one_that_was_saved(url):
    path = objects(url)[0]
    flip(path, 10_000)
    found = ckpt_cloud.verify(url)
    assert found.ok
    assert [Path(key).name for key in found.rewritten] == [path.name]


def contradict(url, **changes):
    """Commits the same save with another manifest, as one who can write to the store could."""
    root = Path(url.removeprefix("file://"))
    register = msgspec.json.decode((root / "COMMIT").read_bytes(), type=Register)
    path = root / register.manifest.key
    data = forge.changed(path.read_bytes(), **changes)
    path.write_bytes(data)
    reference = manifests.reference(manifest_key(register.attempt), data)
    (root / "COMMIT").write_bytes(encode(msgspec.structs.replace(register, manifest=reference)))


def test_a_manifest_that_contradicts_itself(url):
    contradict(url, tensors={"b": ["float32", [3], [[[0], [2], 0, 0]], False]})
    found = ckpt_cloud.verify(url)
    assert "not covered" in found.faults[0].message
    assert found.faults[0].key.endswith("/manifest")


CONTRADICTIONS = {
    "a part that is stored nowhere": ("covered", [[[0], [2], 0, 0]]),
    "a part that is stored twice": ("covered", [[[0], [2], 0, 0], [[1], [2], 0, 8]]),
    "bytes of another chunk": ("shares bytes", [[[0], [2], 0, 0], [[2], [1], 0, 4]]),
    "bytes behind the object": ("outside", [[[0], [3], 0, 1 << 40]]),
    "an object that is not there": ("in no object", [[[0], [3], 7, 0]]),
}


@pytest.mark.parametrize(("said", "chunks"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_nothing_is_loaded_from_a_manifest_that_contradicts_itself(url, said, chunks):
    """What is stored nowhere would come back as whatever was in memory."""
    contradict(url, tensors={"b": ["float32", [3], chunks, False]})
    state = {"b": torch.full((3,), 7.0)}
    for call in (
        lambda: ckpt_cloud.load(state, checkpoint_id=url),
        lambda: ckpt_cloud.open(url),
        lambda: ckpt_cloud.convert(url, f"{url}.pt", to="torch"),
    ):
        with pytest.raises(CorruptManifest, match=said):
            call()
    # Of a part, what concerns it.
    with pytest.raises(CorruptManifest):
        ckpt_cloud.open(url, keys=["b"])
    assert torch.equal(state["b"], torch.full((3,), 7.0))


def test_a_part_that_a_ranks_own_checkpoint_does_not_have(url):
    """Nor does one come back by saying that the rest is with other ranks."""
    contradict(url, tensors={"b": ["float32", [3], [[[0], [2], 0, 0]], False]}, ranks=1)
    opened = ckpt_cloud.open(url)
    assert opened.get_slice("b")[:2].shape == (2,)
    for call in (
        lambda: opened["b"],
        lambda: opened.get_slice("b")[1:],
        lambda: ckpt_cloud.convert(url, f"{url}.pt", to="torch"),
    ):
        with pytest.raises(StateMismatch, match=r"2 of the 3 elements|1 of the 2 elements"):
            call()


def test_what_cannot_be_opened_is_raised(url, tmp_path):
    with pytest.raises(CheckpointNotFound):
        ckpt_cloud.verify(tmp_path / "nothing")
    commit = Path(url.removeprefix("file://")) / "COMMIT"
    register = msgspec.json.decode(commit.read_bytes(), type=Register)
    (commit.parent / register.manifest.key).write_bytes(b"other")
    with pytest.raises(CorruptManifest):
        ckpt_cloud.verify(url)
    commit.write_bytes(b"{")
    with pytest.raises(CorruptCommit):
        ckpt_cloud.verify(url)
    commit.write_bytes(encode(Register("deleted", register.attempt)))
    with pytest.raises(CheckpointDeleted):
        ckpt_cloud.verify(url)


def test_checkpoints_of_single_ranks_are_checked_together(tmp_path):
    writer = ObjectStoreWriter(tmp_path / "run")
    dcp.save({"w": torch.ones(1000)}, storage_writer=writer, use_collectives=False)
    assert ckpt_cloud.verify(tmp_path / "run", deep=True).ok
    (path,) = (tmp_path / "run").glob("rank-00000/data/*/0.safetensors")
    flip(path, 3000)
    (fault,) = ckpt_cloud.verify(tmp_path / "run", deep=True).faults
    assert fault.key == str(path.relative_to(tmp_path / "run"))


def test_on_a_server(s3_url):
    ckpt_cloud.save({"w": torch.arange(MIB)}, checkpoint_id=s3_url)
    found = ckpt_cloud.verify(s3_url, deep=True)
    assert found.ok
    assert found.rewritten == []
    assert found.bytes_read == found.size_bytes


def command(*args):
    code = "from ckpt_cloud.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, "verify", *map(str, args)], capture_output=True, text=True, check=False
    )


def test_the_command(url):
    done = command(url)
    assert (done.returncode, done.stdout.startswith("whole: ")) == (0, True), done.stderr
    flip(objects(url)[0], 100)
    assert command(url).returncode == 0
    damaged = command(url, "--deep")
    assert damaged.returncode == 4
    assert f"{objects(url)[0].name}: bytes 0 to " in damaged.stdout
    shown = json.loads(command(url, "--deep", "--json").stdout)
    assert shown["ok"] is False
    assert [fault["end"] for fault in shown["faults"]] == [4096]
    assert command("file:///nothing/here").returncode == 1


def test_no_torch_is_needed():
    code = "import sys; sys.modules['torch'] = None; import ckpt_cloud.verification, ckpt_cloud.cli.verify"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_stores_own_checksum_is_compared(tmp_path, monkeypatch):
    """Where a listing tells it, as Google's does: then damage is found without reading a byte."""
    for name, key in (("plain", None), ("sealed", bytes(32))):
        writer = ckpt_cloud.ObjectStoreWriter(tmp_path / name, encryption_key=key)
        ckpt_cloud.save({"w": torch.arange(100_000)}, storage_writer=writer)
    plain = NativeStore._info

    def told(store, key, meta):
        path = tmp_path / store.url.rpartition("/")[2] / key
        return dataclasses.replace(plain(store, key, meta), crc32c=crc32c.crc32c(path.read_bytes()))

    monkeypatch.setattr(NativeStore, "_info", told)
    found = ckpt_cloud.verify(tmp_path / "plain")
    assert (found.ok, found.checked_by_store, found.bytes_read) == (True, 1, 0)
    # What a store knows of sealed bytes says nothing of what was saved.
    found = ckpt_cloud.verify(tmp_path / "sealed", encryption_key=bytes(32))
    assert (found.ok, found.checked_by_store) == (True, 0)
    (pack,) = (tmp_path / "plain").rglob("*.safetensors")
    pack.write_bytes(pack.read_bytes()[:-1] + b"?")
    found = ckpt_cloud.verify(tmp_path / "plain")
    assert not found.ok
    assert "CRC32C" in found.faults[0].message
