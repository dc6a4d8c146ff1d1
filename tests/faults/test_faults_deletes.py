"""Deletes that fail in part, or that a server does not do in bulk; and aborts that fail."""

import secrets
from datetime import timedelta

import pytest

import ckpt_cloud
from ckpt_cloud import ObjectStoreWriter, RetryOptions
from ckpt_cloud.errors import CkptCloudError, PermissionDenied
from tests.faults import server as faults
from tests.faults.dialect import Answer

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
]

NAMES = ["a", "b", "c"]


def stored(server):
    return sorted(name.rpartition("/")[2] for name in server.dialect.objects)


def one_is_refused(code):
    """A bulk delete that is carried out but for one key, as its body says under a 200."""

    def act(exchange):
        kept = {name: data for name, data in exchange.server.dialect.objects.items() if name.endswith("/b")}
        exchange.answer()
        exchange.server.dialect.objects.update(kept)
        (name,) = kept
        key = name.partition("/")[2]
        error = f"<Error><Key>{key}</Key><Code>{code}</Code><Message>on demand</Message></Error>"
        body = f"<DeleteResult>{error}</DeleteResult>".encode()
        exchange.send(Answer(200, body, {"Content-Type": "application/xml"}))

    return act


async def filled(opened):
    store = opened(secrets.token_hex(4))
    for name in NAMES:
        await store.put(name, b"x")
    return store


@pytest.mark.parametrize("code", ["InternalError", "SlowDown"])
async def test_a_key_that_could_not_be_deleted_is_tried_again(server, opened, code):
    store = await filled(opened)
    fault = server.fault(one_is_refused(code), query="delete", times=1)
    await store.delete(NAMES)
    assert fault.hits == 1
    assert stored(server) == []


async def test_a_key_that_may_not_be_deleted_is_told(server, opened):
    store = await filled(opened)
    server.fault(one_is_refused("AccessDenied"), query="delete")
    with pytest.raises(PermissionDenied):
        await store.delete(NAMES)
    assert stored(server) == ["b"]
    server.heal()
    await store.delete(NAMES)
    assert stored(server) == []


async def test_a_server_without_bulk_deletes(server, opened):
    store = await filled(opened)
    fault = server.fault(faults.refuse(501, "NotImplemented"), query="delete")
    await store.delete([*NAMES, "never-was"])
    assert fault.hits > 0
    assert stored(server) == []


def test_an_upload_whose_abort_fails_too_is_the_collectors(seaweedfs, monkeypatch, nobodys_cloud, engine):
    """Two faults at once: the parts are left, and the next collection ends them."""
    from tests.faults.proxy import FaultProxy

    with FaultProxy(seaweedfs) as proxy:
        for name, value in proxy.env.items():
            monkeypatch.setenv(name, value)
        bucket = f"aborts-{secrets.token_hex(4)}"
        proxy.create_bucket(bucket)
        proxy.fault(faults.refuse(403, "AccessDenied"), query="partNumber", after=1)
        abort = proxy.fault(faults.refuse(500, "InternalError"), method="DELETE", query="uploadId")
        quick = {"engine": engine, "retry": RetryOptions(max_retries=1, max_backoff_s=0.05)}
        writer = ObjectStoreWriter(
            f"s3://{bucket}/run/it", transfer=ckpt_cloud.TransferOptions(part_size=5 << 20), **quick
        )
        with pytest.raises(CkptCloudError):
            ckpt_cloud.save({"item": b"x" * (11 << 20)}, storage_writer=writer)
        assert abort.hits > 0
        proxy.heal()
        root = f"s3://{bucket}/run"
        left = ckpt_cloud.list_uploads(root)
        assert left
        assert len(ckpt_cloud.gc(root, older_than=timedelta(0)).uploads) == len(left)
        assert ckpt_cloud.list_uploads(root) == []
