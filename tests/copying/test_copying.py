"""Copies of checkpoints: between stores, verified, committed last, in fixed memory."""

import secrets

import pytest
import torch

import ckpt_cloud
from ckpt_cloud import CommitOptions, TransferOptions
from ckpt_cloud.errors import (
    CheckpointExists,
    CheckpointNotFound,
    ChecksumMismatch,
    CommitStateUnknown,
    MissingObject,
    NotFound,
    StoreUnavailable,
)
from ckpt_cloud.events import BytesMoved, PartEnded
from ckpt_cloud.transfer.budget import Budget

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

PARTS = TransferOptions(part_size=5 << 20, pack_size=16 << 20, range_size=5 << 20, memory_budget=20 << 20)
QUICK = CommitOptions(deadline_s=0.2, pause_s=0.001, max_pause_s=0.01)


def state(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {**{f"w{n}": torch.randn(3 << 20, generator=generator) for n in range(3)}, "step": seed}


@pytest.fixture
def source():
    url = f"memory://{secrets.token_hex(6)}/run/step-1"
    writer = ckpt_cloud.ObjectStoreWriter(url, transfer=PARTS, metrics={"loss": 2.0}, user_metadata={"tag": "a"})
    ckpt_cloud.save(state(1), storage_writer=writer)
    return url


def loaded(url):
    found = state(0)
    ckpt_cloud.load(found, checkpoint_id=url)
    return found


def is_right(url):
    found, right = loaded(url), state(1)
    return found["step"] == 1 and all(torch.equal(found[key], right[key]) for key in right if key != "step")


@pytest.mark.parametrize("cloud", ["file", "moto_server", "azurite", "fake_gcs"])
def test_to_another_store(source, cloud, tmp_path, request, monkeypatch):
    target = str(tmp_path / "copy")
    if cloud != "file":
        server = request.getfixturevalue(cloud)
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        bucket = f"copies-{secrets.token_hex(4)}"
        server.create_bucket(bucket)
        target = f"{ {'moto_server': 's3', 'azurite': 'az', 'fake_gcs': 'gs'}[cloud] }://{bucket}/copy"
    copied = ckpt_cloud.copy(source, target, transfer=PARTS, read_back=True)
    assert is_right(copied.url)
    (info,) = ckpt_cloud.list_checkpoints(target.rpartition("/")[0])
    assert (info.attempt, info.metrics) == (copied.attempt, {"loss": 2.0})


def test_the_commit_comes_last_and_the_source_stays(source, store_faults):
    store_faults.clear()
    target = f"memory://{secrets.token_hex(6)}/copy"
    ckpt_cloud.copy(source, target, transfer=PARTS)
    puts = [op.key for op in store_faults.operations if op.operation.startswith("put") and not op.key.endswith("probe")]
    assert puts[-1] == "COMMIT"
    assert puts[-2].endswith("manifest")
    assert is_right(source)


def test_memory_stays_within_the_budget(source, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr("ckpt_cloud.copying.Budget", lambda size: made.append(Budget(size)) or made[-1])
    events = []
    ckpt_cloud.copy(source, tmp_path / "copy", transfer=PARTS, on_event=events.append)
    (budget,) = made
    assert 0 < budget.peak_bytes <= PARTS.memory_budget
    for kind in (BytesMoved, PartEnded):
        assert sum(event.size_bytes for event in events if isinstance(event, kind)) > 3 * 12 << 20


def test_nothing_is_replaced_unless_told(source, tmp_path):
    ckpt_cloud.save({"other": torch.ones(1)}, checkpoint_id=tmp_path / "copy")
    with pytest.raises(CheckpointExists):
        ckpt_cloud.copy(source, tmp_path / "copy")
    ckpt_cloud.copy(source, tmp_path / "copy", overwrite=True)
    assert is_right(tmp_path / "copy")


def test_onto_a_deleted_checkpoint(source, tmp_path):
    ckpt_cloud.copy(source, tmp_path / "copy")
    ckpt_cloud.delete(tmp_path / "copy")
    ckpt_cloud.copy(source, tmp_path / "copy")
    assert is_right(tmp_path / "copy")


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda faults: faults.corrupt("*.safetensors"), ChecksumMismatch),
        (lambda faults: faults.fail("get_range", error=NotFound, times=None), MissingObject),
        (lambda faults: faults.fail("put*", key="*.safetensors", times=None), StoreUnavailable),
        (lambda faults: faults.fail("put", key="*/manifest", times=None), StoreUnavailable),
    ],
    ids=["damaged", "gone", "upload fails", "manifest fails"],
)
def test_what_goes_wrong_publishes_nothing_and_leaves_nothing(source, tmp_path, store_faults, spoil, error):
    spoil(store_faults)
    with pytest.raises(error):
        ckpt_cloud.copy(source, tmp_path / "copy", transfer=PARTS)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    store_faults.clear()
    assert is_right(source)


def test_damage_on_the_way_is_read_again(source, tmp_path, store_faults):
    store_faults.corrupt("*.safetensors", times=1)
    ckpt_cloud.copy(source, tmp_path / "copy", transfer=PARTS)
    store_faults.clear()
    assert is_right(tmp_path / "copy")


def test_a_commit_in_doubt_deletes_nothing(source, tmp_path, store_faults):
    store_faults.fail("put", key="COMMIT", applied=True, times=1)
    store_faults.fail("get", key="COMMIT", times=None, after=2)
    with pytest.raises(CommitStateUnknown):
        ckpt_cloud.copy(source, tmp_path / "copy", transfer=PARTS, commit=QUICK)
    store_faults.clear()
    assert is_right(tmp_path / "copy")


def test_nothing_to_copy(tmp_path):
    with pytest.raises(CheckpointNotFound):
        ckpt_cloud.copy(tmp_path / "nothing", tmp_path / "copy")


def test_a_copy_of_a_signed_checkpoint_may_be_signed_anew(tmp_path):
    ed25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519")
    theirs, ours = ed25519.Ed25519PrivateKey.generate(), ed25519.Ed25519PrivateKey.generate()
    ckpt_cloud.save(state(1), storage_writer=ckpt_cloud.ObjectStoreWriter(tmp_path / "a", sign=theirs))
    ckpt_cloud.copy(tmp_path / "a", tmp_path / "signed", sign=ours)
    ckpt_cloud.copy(tmp_path / "a", tmp_path / "unsigned")
    assert ckpt_cloud.verify(tmp_path / "signed", deep=True, trusted_keys=ours.public_key()).ok
    for name, key in (("signed", theirs), ("unsigned", theirs)):
        with pytest.raises(ckpt_cloud.errors.SignatureError):
            ckpt_cloud.verify(tmp_path / name, trusted_keys=key.public_key())
