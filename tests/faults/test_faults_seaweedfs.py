"""A save, a load and a collection through a faulty proxy in front of a real server.

Whatever happened, once the proxy is well again: what is visible is whole, what was acknowledged is there, the other
checkpoint is untouched, and the collector leaves nothing that no checkpoint needs, unfinished uploads included.
"""

import secrets
from contextlib import contextmanager
from datetime import timedelta
from functools import partial

import pytest
import torch

import ckpt_cloud
from ckpt_cloud import RetryOptions, StoreOptions, TransferOptions
from ckpt_cloud.errors import CkptCloudError, Damaged
from tests.collector.conftest import Run
from tests.faults import proxy as proxies
from tests.faults import server as faults
from tests.faults.proxy import FaultProxy

pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
]

NOW = timedelta(0)
PARTS = TransferOptions(part_size=5 << 20, pack_size=16 << 20, memory_budget=64 << 20)
ELEMENTS = 1_500_000
"""Of 4 bytes: an upload of two parts."""

OPERATIONS = {
    "begin": {"method": "POST", "query": "uploads"},
    "part": {"method": "PUT", "query": "partNumber"},
    "complete": {"method": "POST", "query": "uploadId"},
    "manifest": {"method": "PUT", "key": "*manifest"},
    "commit": {"method": "PUT", "key": "*COMMIT"},
    "read-commit": {"method": "GET", "key": "*COMMIT"},
    "read-manifest": {"method": "GET", "key": "*manifest"},
    "read": {"method": "GET", "key": "*.safetensors"},
    "list": {"method": "GET", "key": "", "query": "list-type"},
    "delete": {"method": "POST", "query": "delete"},
}
PASSING = {
    "503-burst": (faults.refuse(503, "SlowDown"), 6),
    "500": (faults.refuse(500, "InternalError"), 2),
    "page-502": (faults.page(502), 2),
    "reset": (faults.reset, 2),
    "lost-answer": (faults.reset_after_it_took_effect, 2),
    "cut-on-the-way-down": (proxies.cut_on_the_way_down, 2),
    "short-answer": (faults.short(1), 2),
}
UPLOADS = ["part", "manifest", "commit"]
QUICKLY_TOLD = {("part", "503-burst"), ("commit", "lost-answer"), ("delete", "503-burst")}
DOWNLOADS = ["read-commit", "read-manifest", "read"]


@pytest.fixture
def proxy(seaweedfs, monkeypatch, nobodys_cloud):
    with FaultProxy(seaweedfs) as proxy:
        for name, value in proxy.env.items():
            monkeypatch.setenv(name, value)
        yield proxy


class Scene(Run):
    """Checkpoints `it` and `other` behind a proxy."""

    def __init__(self, proxy, engine):
        bucket = f"faulty-{secrets.token_hex(4)}"
        proxy.create_bucket(bucket)
        super().__init__(f"s3://{bucket}/run")
        self.proxy, self.engine = proxy, engine
        self.save("other", 1)
        self.big_save(5)

    def options(self, *, retries=12, **more):
        retry = RetryOptions(max_retries=retries, max_backoff_s=0.05)
        return StoreOptions(engine=self.engine, retry=retry, **more)

    def big_save(self, value, **options):
        state = {"w": torch.full((ELEMENTS,), float(value)), "note": f"step {value}"}
        commit = ckpt_cloud.CommitOptions(deadline_s=10, pause_s=0.01, max_pause_s=0.05)
        writer = ckpt_cloud.ObjectStoreWriter(
            self.url("it"), overwrite=True, store=self.options(**options), transfer=PARTS, commit=commit
        )
        ckpt_cloud.save(state, storage_writer=writer)

    def big_load(self, **options):
        state = {"w": torch.zeros(ELEMENTS), "note": ""}
        reader = ckpt_cloud.ObjectStoreReader(self.url("it"), store=self.options(**options), transfer=PARTS)
        ckpt_cloud.load(state, storage_reader=reader)
        value = int(state["w"][0])
        assert state["w"].eq(value).all()
        assert state["note"] == f"step {value}"
        return value

    def collect(self, **options):
        return ckpt_cloud.gc(self.root, older_than=NOW, store=self.options(**options))

    def check(self, expected):
        """All that must hold once the proxy is well."""
        self.proxy.heal()
        seen = self.big_load()
        assert seen in expected
        assert self.load("other") == 1
        assert self.collect().skipped == []
        assert self.big_load() == seen
        assert set(self.stored()) == self.needed()
        assert ckpt_cloud.list_uploads(self.root, store=self.options()) == []


@pytest.fixture(params=["native", pytest.param("fsspec", marks=pytest.mark.slow)])
def scene(request, proxy):
    return Scene(proxy, request.param)


@contextmanager
def faulty(scene, act, operations, *, times, midway=False):
    """Each of the operations meets the fault, so many times at most."""
    rules = [scene.proxy.fault(act, **OPERATIONS[name], times=times, midway=midway) for name in operations]
    yield
    # An answer without a body cannot be cut, and needs no second try.
    assert all(rule.hits for rule in rules)


@pytest.mark.parametrize("act", PASSING)
def test_what_passes_does_no_harm(scene, act):
    do, times = PASSING[act]
    with faulty(scene, do, OPERATIONS, times=times):
        scene.big_save(2)
        assert scene.big_load() == 2
        scene.collect()
    scene.check([2])


def test_a_body_that_is_cut_on_its_way_up(scene):
    """The real server gets half of it, and must not take it for the whole."""
    with faulty(scene, proxies.cut_on_the_way_up, UPLOADS, times=2, midway=True):
        scene.big_save(2)
    scene.check([2])


@pytest.mark.parametrize(
    "act",
    [
        pytest.param(faults.stall, id="silence"),
        pytest.param(proxies.stalled_on_the_way_down, id="half", marks=pytest.mark.slow),
    ],
)
def test_a_stall_is_given_up_and_tried_again(scene, act):
    quick = {"request_timeout_s": 3.0}
    with faulty(scene, act, ["part", "complete", "commit", "read-commit", "read", "list"], times=1):
        scene.big_save(2, **quick)
        assert scene.big_load(**quick) == 2
        scene.collect(**quick)
    scene.check([2])


@pytest.mark.parametrize("act", [faults.flipped, faults.shorter(3)], ids=["bit-flip", "truncated"])
def test_wrong_bytes_on_the_way_down_are_read_again(scene, act):
    scene.big_save(2)
    with faulty(scene, act, DOWNLOADS, times=1):
        assert scene.big_load() == 2
    scene.check([2])


@pytest.mark.parametrize("operation", UPLOADS)
@pytest.mark.parametrize("checksums", [True, False], ids=["checked", "unchecked"])
def test_wrong_bytes_on_the_way_up_are_never_a_tensor(scene, operation, checksums):
    """The server refuses them if it is told their checksum; else a load finds out."""
    with faulty(scene, faults.flipped_on_the_way_up, [operation], times=1):
        try:
            scene.big_save(2, store_checksums=checksums)
            seen = scene.big_load()
        except Damaged:
            seen = None
    scene.proxy.heal()
    assert scene.load("other") == 1
    if seen is not None:
        assert seen == 2
        scene.check([2])


@pytest.mark.parametrize(
    ("operation", "act"),
    [
        pytest.param(name, act, marks=() if (name, act) in QUICKLY_TOLD else pytest.mark.slow, id=f"{act}-{name}")
        for name in OPERATIONS
        for act in ("503-burst", "lost-answer")
    ],
)
def test_what_does_not_pass_is_a_typed_error(scene, operation, act, monkeypatch):
    # A collection waits for a commit's clear answer, too, and has no option for how long.
    monkeypatch.setattr("ckpt_cloud.collector.CommitOptions", partial(ckpt_cloud.CommitOptions, deadline_s=10))
    fault = scene.proxy.fault(PASSING[act][0], **OPERATIONS[operation])
    quick = {"retries": 2, "request_timeout_s": 10.0}
    told = [
        told_of(scene, step)
        for step in (
            lambda: scene.big_save(2, **quick),
            lambda: scene.big_load(**quick),
            lambda: scene.collect(**quick),
        )
    ]
    assert fault.hits > 0
    if (operation, act) == ("commit", "lost-answer"):
        assert told[:2] == [None, 2], "the read-back tells"
    else:
        assert any(isinstance(each, CkptCloudError) for each in told)
    saved = not isinstance(told[0], CkptCloudError)
    scene.check([2] if saved else [2, 5])


def told_of(scene, step):
    """What a step returns, or the typed error; which shows no secret."""
    try:
        return step()
    except CkptCloudError as error:
        shown = f"{error!r} {error} {getattr(error, '__notes__', '')}"
        assert scene.proxy.env["AWS_SECRET_ACCESS_KEY"] not in shown
        return error
