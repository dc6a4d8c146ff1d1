"""Whole saves and loads over a store that misbehaves: the checkpoint is right, or the error is typed."""

import pytest
import torch
from torch.distributed import checkpoint as dcp

import ckpt_cloud
from ckpt_cloud import ObjectStoreReader, ObjectStoreWriter, RetryOptions, TransferOptions
from ckpt_cloud.errors import (
    CheckpointNotFound,
    ChecksumMismatch,
    CkptCloudError,
    CommitStateUnknown,
    CorruptCommit,
    PermissionDenied,
    StoreUnavailable,
)
from tests.faults import server as faults

pytestmark = [
    pytest.mark.timeout(90),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
]

URL = "s3://bucket/run/step-1"
QUICK = {"retry": RetryOptions(max_retries=8, max_backoff_s=0.05)}
PARTS = TransferOptions(part_size=5 << 20, pack_size=16 << 20, memory_budget=64 << 20)


def state(seed=0):
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"w{number}": torch.randn(1 << 20, generator=generator) for number in range(5)}
    return {**tensors, "step": seed}


def save(engine, **options):
    writer = ObjectStoreWriter(URL, engine=engine, transfer=PARTS, **{**QUICK, **options})
    ckpt_cloud.save(state(7), storage_writer=writer)
    return writer


def check(engine):
    loaded = state(8)
    ckpt_cloud.load(loaded, storage_reader=ObjectStoreReader(URL, engine=engine, **QUICK))
    assert loaded["step"] == 7
    assert all(torch.equal(loaded[name], value) for name, value in state(7).items() if name != "step")


@pytest.mark.parametrize(
    ("act", "match"),
    [
        pytest.param(faults.refuse(503, "SlowDown"), {"times": 6}, id="slow-down-at-first"),
        pytest.param(faults.refuse(503, "SlowDown"), {"query": "partNumber", "times": 6}, id="slow-down-on-parts"),
        pytest.param(faults.reset_after_it_took_effect, {"query": "partNumber", "times": 2}, id="lost-part-answers"),
        pytest.param(
            faults.reset_after_it_took_effect, {"method": "POST", "query": "uploadId", "times": 1}, id="lost-completion"
        ),
        pytest.param(faults.reset_after_it_took_effect, {"method": "PUT", "key": "*COMMIT", "times": 1}, id="lost-ack"),
        pytest.param(faults.refuse(500, "InternalError"), {"method": "PUT", "key": "*COMMIT", "times": 2}, id="500"),
        pytest.param(
            faults.refuse(409, "ConditionalRequestConflict"),
            {"method": "PUT", "key": "*COMMIT", "times": 2},
            id="conflict",
        ),
        pytest.param(faults.page(502), {"method": "PUT", "key": "*manifest", "times": 2}, id="manifest-502"),
        *(
            pytest.param(
                faults.refuse_after_it_took_effect(status),
                {"method": "PUT", "key": "*COMMIT", "times": 1},
                id=f"stored-and-{status}",
            )
            for status in (400, 403, 499, 502)
        ),
    ],
)
def test_a_save_comes_through(server, engine, act, match):
    fault = server.fault(act, **match)
    save(engine)
    assert fault.hits > 0
    server.heal()
    check(engine)
    assert server.dialect.uploads == {}


@pytest.mark.parametrize(
    "act",
    [
        pytest.param(faults.flipped, id="bit-flip"),
        pytest.param(faults.another_range, id="wrong-range"),
        pytest.param(faults.whole_object, id="whole-object"),
        pytest.param(faults.short(5), id="short-body"),
        pytest.param(faults.shorter(5), id="fewer-bytes"),
        pytest.param(faults.reset, id="reset"),
        pytest.param(faults.refuse(503, "SlowDown"), id="slow-down"),
    ],
)
def test_a_load_comes_through(server, engine, act):
    save(engine)
    fault = server.fault(act, method="GET", key="*.safetensors", times=1)
    check(engine)
    assert fault.hits == 1


@pytest.mark.parametrize("key", ["*COMMIT", "*manifest"])
def test_a_flipped_bit_on_the_way_is_read_again(server, engine, key):
    save(engine)
    fault = server.fault(faults.flipped, method="GET", key=key, times=1)
    check(engine)
    assert fault.hits == 1


@pytest.mark.parametrize("act", [faults.flipped, faults.another_range], ids=["bit-flip", "wrong-range"])
def test_bytes_that_are_wrong_twice_are_never_a_tensor(server, engine, act):
    save(engine)
    server.fault(act, method="GET", key="*.safetensors")
    with pytest.raises(ChecksumMismatch, match=r"they serve w\d"):
        check(engine)


@pytest.mark.parametrize(
    ("act", "key", "kind"),
    [
        (faults.refuse(403, "AccessDenied"), "*COMMIT", PermissionDenied),
        (faults.refuse(403, "AccessDenied"), "*.safetensors", PermissionDenied),
        (faults.refuse(500, "InternalError"), "*.safetensors", StoreUnavailable),
        (faults.page(200), "*COMMIT", (CorruptCommit, StoreUnavailable)),
        (faults.error_in_200("InternalError"), "*COMMIT", CkptCloudError),
    ],
    ids=["denied", "denied-data", "500", "page-for-COMMIT", "error-for-COMMIT"],
)
def test_a_load_that_cannot_be(server, engine, act, key, kind):
    save(engine)
    server.fault(act, method="GET", key=key)
    with pytest.raises(kind) as failure:
        check(engine)
    assert "hunter2" not in f"{failure.value!r} {failure.value} {getattr(failure.value, '__notes__', '')}"


def test_a_save_whose_commit_is_never_answered(server, engine):
    server.fault(faults.reset_after_it_took_effect, method="PUT", key="*COMMIT")
    server.fault(faults.reset, method="GET", key="*COMMIT", after=1)
    with pytest.raises(CommitStateUnknown):
        save(engine, commit=ckpt_cloud.CommitOptions(deadline_s=2))
    server.heal()
    check(engine)


def test_a_proxy_that_gave_up_on_the_commit_is_no_refusal(server, engine):
    """Nothing may be deleted: what it had sent on may land later."""
    server.fault(faults.page(499), method="PUT", key="*COMMIT")
    with pytest.raises(CommitStateUnknown):
        save(engine, commit=ckpt_cloud.CommitOptions(deadline_s=1))
    assert [key for key in server.dialect.objects if key.endswith(".safetensors")]


def test_a_token_that_expires_in_the_middle_leaves_nothing_behind(server, engine):
    server.fault(faults.refuse(400, "ExpiredToken"), query="partNumber", after=2)
    with pytest.raises(PermissionDenied, match="expired"):
        save(engine)
    server.heal()
    assert server.dialect.uploads == {}
    with pytest.raises(CheckpointNotFound):
        check(engine)
    save(engine)
    check(engine)


def test_dcps_own_functions_too(server, engine):
    server.fault(faults.refuse(503, "SlowDown"), times=6)
    dcp.save(state(7), storage_writer=ObjectStoreWriter(URL, engine=engine, **QUICK))
    server.fault(faults.short(3), method="GET", times=1)
    loaded = state(8)
    dcp.load(loaded, storage_reader=ObjectStoreReader(URL, engine=engine, **QUICK))
    assert torch.equal(loaded["w3"], state(7)["w3"])
