"""Checkpoints under a root: each in its state, none in the way of another."""

import pytest

import ckpt_cloud
from ckpt_cloud import bridge
from ckpt_cloud.catalog import CheckpointInfo, latest, list_checkpoints
from ckpt_cloud.commit import publish
from ckpt_cloud.errors import FixRequest, StoreUnavailable
from ckpt_cloud.format import register as registers
from ckpt_cloud.format.layout import COMMIT_KEY, mint_id
from ckpt_cloud.format.manifest import Manifest
from ckpt_cloud.format.register import Register
from ckpt_cloud.options import CommitOptions, RetryOptions, StoreOptions
from ckpt_cloud.protocol import Seen
from ckpt_cloud.stores import open_store, parse_url

EPOCH_S = 1_700_000_000


def id_at(second):
    return mint_id((EPOCH_S + second) * 1000 + 250, bytes(10))


def at(root, name):
    return open_store(parse_url(root).child(name), StoreOptions())


def commit(root, name, second):
    body = Manifest(attempt=id_at(second), writer="test", objects=[], tensors={}, items={})
    store = at(root, name)
    options = CommitOptions()
    bridge.run(publish(store, body, oldest=body.attempt, seen=Seen(None), overwrite=False, options=options))


def write(root, name, data, key=COMMIT_KEY):
    bridge.run(at(root, name).put(key, data))


@pytest.fixture(params=["memory", "local"])
def root(request, tmp_path):
    return f"memory://{tmp_path.name}/runs" if request.param == "memory" else str(tmp_path / "my runs #1")


def states(root):
    return {info.name: info.state for info in list_checkpoints(root)}


def test_an_empty_root(root):
    assert list_checkpoints(root) == []
    assert latest(root) is None


def test_oldest_first_by_the_begin_of_the_save_not_by_name(root):
    for name, second in (("step-9", 30), ("step-10", 10), ("step-100", 20)):
        commit(root, name, second)
    assert [info.name for info in list_checkpoints(root)] == ["step-10", "step-100", "step-9"]
    assert latest(root) == parse_url(root).child("step-9").url


def test_what_is_known_of_one(root):
    commit(root, "step 1", 7)
    (info,) = list_checkpoints(root)
    url = parse_url(root).child("step 1").url
    assert info == CheckpointInfo(url, "step 1", "committed", id_at(7), EPOCH_S + 7.25)
    assert ckpt_cloud.latest(root) == url


def test_every_state(root):
    commit(root, "good", 1)
    write(root, "died", b"x", key=f"data/{id_at(9)}/0.safetensors")
    write(root, "garbage", b"\xff not json")
    write(root, "empty", b"")
    write(root, "newer", b'{"format": "ckpt-cloud", "version": 99}')
    write(root, "flagged", b'{"format": "ckpt-cloud", "version": 1, "flags": ["holograms"]}')
    write(root, "oversize", b" " * 100_000)
    write(root, "deep", b'{"a":' * 10_000)
    fields = registers.encode(Register("committed", id_at(8), manifest=registers.ManifestRef("../../x", 1, "0" * 64)))
    write(root, "escaping", fields)
    write(root, "gone", registers.encode(Register("deleted", id_at(5), id_at(6))))
    write(root, "given-up", registers.encode(Register("aborted", id_at(6), id_at(7))))

    assert states(root) == {
        "good": "committed",
        "died": "incomplete",
        "garbage": "unreadable",
        "empty": "unreadable",
        "newer": "unreadable",
        "flagged": "unreadable",
        "oversize": "unreadable",
        "deep": "unreadable",
        "escaping": "unreadable",
        "gone": "deleted",
        "given-up": "aborted",
    }
    assert latest(root) == parse_url(root).child("good").url


def test_latest_passes_over_what_cannot_be_loaded(root):
    commit(root, "old", 1)
    write(root, "newest", registers.encode(Register("deleted", id_at(50), id_at(60))))
    assert latest(root) == parse_url(root).child("old").url
    write(root, "old", registers.encode(Register("deleted", id_at(1), id_at(60))))
    assert latest(root) is None


def test_objects_right_under_the_root_are_no_checkpoints(root):
    commit(root, "step-1", 1)
    bridge.run(open_store(parse_url(root), StoreOptions()).put("notes.txt", b"x"))
    assert list(states(root)) == ["step-1"]


def test_more_than_are_looked_at_at_once(root):
    for number in range(40):
        write(root, f"step-{number}", registers.encode(Register("aborted", id_at(number), id_at(99))))
    assert [info.name for info in list_checkpoints(root)] == [f"step-{number}" for number in range(40)]


def test_on_a_server(s3_url):
    commit(s3_url, "step 1", 2)
    commit(s3_url, "step#2", 1)
    write(s3_url, "step-3", b"garbage")
    write(s3_url, "step-4", b" " * 100_000)
    assert [(info.name, info.state) for info in list_checkpoints(s3_url)] == [
        ("step-3", "unreadable"),
        ("step-4", "unreadable"),
        ("step#2", "committed"),
        ("step 1", "committed"),
    ]
    assert latest(s3_url) == f"{s3_url}/step 1"
    assert latest(f"{s3_url}-other") is None


def test_a_bucket_that_is_not_there(s3_url):
    with pytest.raises(FixRequest):
        list_checkpoints("s3://no-such-bucket-anywhere/runs")


def test_a_server_that_is_not_there():
    options = StoreOptions(endpoint_url="http://127.0.0.1:9", anonymous=True, retry=RetryOptions(first_contact_s=0.3))
    with pytest.raises(StoreUnavailable):
        list_checkpoints("s3://bucket/runs", store=options)
