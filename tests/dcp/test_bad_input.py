"""What bad input gets: an error of ours that names the URL and what to do, with nothing that exists touched."""

import socket
import threading
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

import ckpt_cloud
from ckpt_cloud import ObjectStoreReader, ObjectStoreWriter
from ckpt_cloud.errors import (
    BucketNotFound,
    CheckpointIncomplete,
    CheckpointNotFound,
    ChecksumMismatch,
    CorruptCommit,
    CorruptManifest,
    FixRequest,
    InvalidURL,
    MissingCredentials,
    MissingObject,
    PermissionDenied,
    StateMismatch,
    StoreUnavailable,
    Unsupported,
    UntrustedItem,
)

STATE = {"w": torch.arange(100_000.0), "step": 1}


def save(url, **options):
    ckpt_cloud.save(STATE, storage_writer=ObjectStoreWriter(url, **options))


def load(url, **options):
    loaded = {"w": torch.zeros(100_000), "step": 0}
    ckpt_cloud.load(loaded, storage_reader=ObjectStoreReader(url, **options))
    return loaded


@pytest.fixture(params=[save, load], ids=["save", "load"])
def call(request):
    """Both directions meet the same store."""
    return request.param


@pytest.mark.parametrize(
    "url",
    [
        "gopher://host/x",
        "s3://",
        "s3:///x",
        "s3:/bucket/x",
        "s3://bucket/a/../b",
        "s3://bucket//x",
        "s3://user:MARKED@bucket/x",
        "s3://bucket/x?X-Amz-Signature=MARKED",
        "file://",
        "",
        "nul\0",
    ],
)
def test_a_url_that_is_none(call, url):
    with pytest.raises(InvalidURL) as refused:
        call(url)
    assert "MARKED" not in str(refused.value) + repr(refused.value)
    assert isinstance(refused.value, ValueError)


def test_a_missing_bucket(call, moto_server, monkeypatch):
    for name, value in moto_server.env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BucketNotFound) as refused:
        call("s3://no-such-bucket/run")
    assert "s3://no-such-bucket/run" in refused.value.url
    assert "create the bucket" in refused.value.hint


def test_a_missing_bucket_on_seaweedfs(call, seaweedfs, monkeypatch):
    """It would create the bucket on the first put."""
    for name, value in seaweedfs.env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BucketNotFound):
        call("s3://no-such-bucket/run")


def test_no_credentials(call, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(MissingCredentials) as refused:
        call("s3://bucket/run", endpoint_url="http://127.0.0.1:1")
    assert "AWS_PROFILE" in refused.value.hint
    assert refused.value.url == "s3://bucket/run"


def test_a_profile_that_does_not_exist(call, monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(FixRequest, match="nobody"):
        call("s3://bucket/run")


@pytest.mark.parametrize("wrong", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_no_permission(call, seaweedfs, monkeypatch, wrong):
    seaweedfs.create_bucket("permission")
    for name, value in seaweedfs.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(wrong, "MARKEDWRONG")
    with pytest.raises(PermissionDenied) as refused:
        call("s3://permission/run")
    assert isinstance(refused.value, PermissionError)
    assert "s3://permission/run" in refused.value.url
    assert "credentials" in refused.value.hint
    assert "MARKEDWRONG" not in str(refused.value) + "".join(refused.value.__notes__)


KEYS = {"access_key_id": "AKIAMARKED", "secret_access_key": "MARKED"}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.timeout(60)
def test_nobody_listens(call):
    endpoint = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(StoreUnavailable) as refused:
        call("s3://bucket/run", endpoint_url=endpoint, **KEYS)
    assert "s3://bucket/run" in refused.value.url
    assert "endpoint" in refused.value.hint
    assert "MARKED" not in str(refused.value) + "".join(refused.value.__notes__)


@pytest.fixture
def silent_endpoint():
    """A server that takes connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(64)
        taken = []
        closing = threading.Event()

        def accept():
            while not closing.is_set():
                try:
                    taken.append(server.accept()[0])
                except OSError:
                    return

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        closing.set()
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
        for connection in taken:
            connection.close()


@pytest.mark.timeout(60)
@pytest.mark.slow
def test_nobody_answers(call, silent_endpoint):
    with pytest.raises(StoreUnavailable, match="within"):
        call("s3://bucket/run", endpoint_url=silent_endpoint, **KEYS)


def test_nothing_is_there(url):
    with pytest.raises(CheckpointNotFound) as refused:
        load(url)
    assert refused.value.url == url
    assert isinstance(refused.value, FileNotFoundError)
    assert "latest" in refused.value.hint


def stored(url, pattern):
    """The one file of a local checkpoint that matches."""
    (path,) = Path(url.removeprefix("file://")).glob(pattern)
    return path


def test_a_half_written_checkpoint(file_url):
    save(file_url)
    stored(file_url, "COMMIT").unlink()
    with pytest.raises(CheckpointIncomplete, match="no COMMIT"):
        load(file_url)
    assert ckpt_cloud.latest(file_url.rpartition("/")[0]) is None


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda data: b"", CorruptCommit),
        (lambda data: data[: len(data) // 2], CorruptCommit),
        (lambda data: b"\xff\xfe garbage", CorruptCommit),
        (lambda data: data.replace(b'"version": 2', b'"version": 3'), Unsupported),
        (lambda data: data.replace(b'"flags": []', b'"flags": ["time-travel"]'), Unsupported),
        (lambda data: data.replace(b"data/", b"../../"), CorruptCommit),
    ],
    ids=["empty", "truncated", "garbage", "newer version", "unknown flag", "traversal"],
)
def test_a_damaged_commit(file_url, damage, error):
    save(file_url)
    path = stored(file_url, "COMMIT")
    before = path.read_bytes()
    path.write_bytes(damage(before))
    assert path.read_bytes() != before
    with pytest.raises(error) as refused:
        load(file_url)
    assert file_url in refused.value.url
    damaged = path.read_bytes()
    with pytest.raises(error):
        save(file_url, overwrite=True)
    assert path.read_bytes() == damaged


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: data[:50] + b"X" + data[51:]], ids=["truncated", "altered"]
)
def test_a_damaged_manifest(file_url, damage):
    save(file_url)
    path = stored(file_url, "data/*/manifest")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CorruptManifest):
        load(file_url)


def test_a_manifest_that_is_gone(file_url):
    save(file_url)
    stored(file_url, "data/*/manifest").unlink()
    with pytest.raises(CorruptManifest, match="gone"):
        load(file_url)


def test_a_data_object_that_is_gone(file_url):
    save(file_url)
    path = stored(file_url, "data/*/0.safetensors")
    path.unlink()
    with pytest.raises(MissingObject, match="gone") as refused:
        load(file_url)
    assert refused.value.url.endswith(path.name)


def test_a_data_object_that_was_cut_short(file_url):
    save(file_url)
    path = stored(file_url, "data/*/0.safetensors")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(MissingObject, match="should have"):
        load(file_url)


def test_a_flipped_bit(file_url):
    save(file_url)
    path = stored(file_url, "data/*/0.safetensors")
    data = bytearray(path.read_bytes())
    data[300_000] ^= 1
    path.write_bytes(data)
    with pytest.raises(ChecksumMismatch, match="bytes 262144 to") as refused:
        load(file_url)
    assert "they serve w" in str(refused.value)
    assert path.name in refused.value.url


def test_shapes_keys_and_dtypes_that_do_not_fit(url):
    save(url)
    cases = [
        ({"w": torch.zeros(7)}, r"w: stored shape \(100000,\), state \(7,\)"),
        ({"w": torch.zeros(100_000), "nope": torch.zeros(1)}, "nope is not in the checkpoint"),
        ({"w": torch.zeros(100_000, dtype=torch.float64)}, "stored torch.float32, state torch.float64"),
    ]
    for state, said in cases:
        with pytest.raises(StateMismatch, match=said) as refused:
            ckpt_cloud.load(state, checkpoint_id=url)
        assert refused.value.url == url
        assert refused.value.hint
        assert isinstance(refused.value, ValueError)
        assert not state["w"].any()


def test_all_that_does_not_fit_is_listed(url):
    save(url)
    with pytest.raises(StateMismatch) as refused:
        ckpt_cloud.load({"w": torch.zeros(7), "a": torch.zeros(1), "b": torch.zeros(1)}, checkpoint_id=url)
    assert all(said in str(refused.value) for said in ("w: stored", "a is not", "b is not"))


def test_a_partial_load_still_needs_the_shapes(url):
    save(url)
    planner = DefaultLoadPlanner(allow_partial_load=True)
    with pytest.raises(StateMismatch, match="stored shape"):
        ckpt_cloud.load({"w": torch.zeros(7), "new": torch.zeros(1)}, checkpoint_id=url, planner=planner)


SPRUNG = []


def spring():
    """What an attacker would like to be called."""
    SPRUNG.append(1)


class Trap:
    """Calls `spring` when it is unpickled."""

    def __reduce__(self):
        return spring, ()


def test_an_item_that_would_run_code_is_not_opened(url):
    ckpt_cloud.save({"w": torch.ones(2), "trap": Trap()}, checkpoint_id=url)
    SPRUNG.clear()
    with pytest.raises(UntrustedItem, match="'trap'") as refused:
        ckpt_cloud.load({"w": torch.zeros(2), "trap": None}, checkpoint_id=url)
    assert "trust=True" in refused.value.hint
    assert SPRUNG == []
    loaded = {"w": torch.zeros(2), "trap": 0}
    ckpt_cloud.load(loaded, storage_reader=ObjectStoreReader(url, trust=True))
    assert SPRUNG == [1]


def test_dcps_own_functions_give_our_error_too(url):
    """DCP turns what `read_metadata` raises into an `AssertionError`; ours arrives all the same."""
    with pytest.raises(CheckpointException) as refused:
        dcp.load({"w": torch.zeros(1)}, storage_reader=ObjectStoreReader(url))
    assert isinstance(refused.value.failures[0][0], CheckpointNotFound)
    with pytest.raises(CheckpointNotFound):
        ObjectStoreReader(url).read_metadata()
    with pytest.raises(CheckpointNotFound):
        ObjectStoreReader(url).read_metadata(rank=0)
