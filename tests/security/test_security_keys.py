"""Keys from storage: only those that the format writes are ever asked for (docs/format.md, section 3)."""

import msgspec
import pytest

import ckpt_cloud
from ckpt_cloud import ObjectStoreReader, ObjectStoreWriter
from ckpt_cloud.errors import CorruptCommit, CorruptManifest
from ckpt_cloud.format import manifest as manifests
from ckpt_cloud.format.register import Register, encode
from tests import forge
from tests.faults.server import FaultServer

ID = "0190b5c4f00e7abc8def0123456789ab"
KEYS = [
    "",
    "..",
    "../x",
    "/etc/passwd",
    "s3://other/key",
    "COMMIT",
    f"data/{ID}/../{ID}/0.safetensors",
    f"data/{ID}/..%2f0.safetensors",
    f"data/{ID}/0.safetensors\0",
    f"data/{ID}/0.safetensors\n",
    f"data//{ID}/0.safetensors",
    f"./data/{ID}/0.safetensors",
    f"data\\{ID}\\0.safetensors",
    f"data/{ID.upper()}/0.safetensors",
    f"data/{ID}/\u0660.safetensors",
    f"data/{ID}/0.safetensors?versionId=1",
]


@pytest.fixture
def server(monkeypatch):
    with FaultServer() as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        server.create_bucket("bucket")
        ckpt_cloud.save({"n": "x" * 9}, storage_writer=ObjectStoreWriter("s3://bucket/run"), no_dist=True)
        yield server


def replaced(server, key, change):
    """An object of the checkpoint, with other bytes."""
    (name,) = [name for name in server.dialect.objects if name.endswith(f"/{key}")]
    data, *rest = server.dialect.objects[name]
    server.dialect.objects[name] = (change(data), *rest)
    return server.dialect.objects[name][0]


@pytest.mark.parametrize("key", KEYS)
def test_in_a_manifest(server, key):
    def swap(data):
        return forge.changed(data, objects=[[key, 9, 4096, b"0000"]])

    data = replaced(server, "manifest", swap)
    register = msgspec.json.decode(replaced(server, "COMMIT", bytes), type=Register)
    reference = manifests.reference(register.manifest.key, data)
    replaced(server, "COMMIT", lambda _: encode(msgspec.structs.replace(register, manifest=reference)))
    refused_without_a_request(server, CorruptManifest, {"run/COMMIT", f"run/{register.manifest.key}"})


@pytest.mark.parametrize("key", KEYS)
def test_in_commit(server, key):
    def swap(data):
        document = msgspec.json.decode(data)
        document["manifest"]["key"] = key
        return msgspec.json.encode(document)

    replaced(server, "COMMIT", swap)
    refused_without_a_request(server, CorruptCommit, {"run/COMMIT"})


def refused_without_a_request(server, error, known):
    server.requests.clear()
    with pytest.raises(error):
        ckpt_cloud.load({"n": ""}, storage_reader=ObjectStoreReader("s3://bucket/run"), no_dist=True)
    with pytest.raises(error):
        ckpt_cloud.verify("s3://bucket/run", deep=True)
    assert {request.key for request in server.requests} <= known
