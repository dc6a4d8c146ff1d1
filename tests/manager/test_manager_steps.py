"""Saving and restoring by step: the newest good one, parts of a state, metrics, and what it costs to ask."""

import logging

import msgspec
import pytest
import torch

import ckpt_cloud
from ckpt_cloud import bridge
from ckpt_cloud.errors import (
    CheckpointDeleted,
    CheckpointExists,
    CheckpointNotFound,
    ChecksumMismatch,
    Damaged,
    InvalidOption,
    PermissionDenied,
    StoreUnavailable,
    Unsupported,
)
from ckpt_cloud.format import register as registers
from ckpt_cloud.format.layout import mint_id
from ckpt_cloud.format.register import ManifestRef, Register
from ckpt_cloud.options import StoreOptions
from ckpt_cloud.stores import open_store, parse_url
from tests.faults.server import FaultServer

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def store_at(root):
    return open_store(parse_url(root), StoreOptions())


def damage(root, step, pattern="data/"):
    """Flips a bit in the middle of every object of a step that lies under `pattern`."""

    async def flip():
        store = store_at(f"{root}/step-{step}")
        for info in [info async for info in store.list()]:
            if pattern in info.key:
                data, _ = await store.get(info.key, limit=1 << 30)
                body = bytearray(data)
                body[len(body) // 2] ^= 0x80
                await store.put(info.key, bytes(body))

    bridge.run(flip())


def test_a_new_run(manage, made):
    manager = manage()
    given = made(0)
    assert (manager.latest(), manager.all_steps(), manager.best("loss")) == (None, [], None)
    assert manager.restore(given) is None
    assert given["n"] == 0


def test_save_and_restore(manage, made):
    with manage() as manager:
        for step in (9, 10, 100):
            manager.save(step, made(step))
    manager = manage()
    given = made(0)
    assert manager.all_steps() == [9, 10, 100]
    assert manager.latest() == 100
    assert manager.restore(given) == 100
    assert (given["n"], float(given["model"]["w"][3])) == (100, 100.0)
    assert manager.restore(given, step=9) == 9
    assert given["n"] == 9
    with pytest.raises(CheckpointNotFound):
        manager.restore(given, step=11)


def test_a_step_is_saved_once_unless_told_otherwise(manage, made):
    manager = manage()
    manager.save(1, made(1))
    with pytest.raises(CheckpointExists):
        manager.save(1, made(2))
    other = manage(overwrite=True)
    other.save(1, made(2))
    given = made(0)
    other.restore(given)
    assert given["n"] == 2


@pytest.mark.parametrize("step", [-1, 1.0, True, "3", None])
def test_a_step_is_a_number(manage, made, step):
    with pytest.raises(InvalidOption):
        manage().save(step, made(1))


def test_other_names_are_no_steps(manage, made, root):
    manager = manage()
    manager.save(3, made(3))
    for name in ("step-4-old", "step-04", "best", "step-"):
        ckpt_cloud.save(made(1), checkpoint_id=f"{root}/{name}")
    assert manager.all_steps() == [3]
    assert manager.latest() == 3


def test_restore_goes_back_past_damage_and_says_so(manage, made, root, caplog):
    manager = manage()
    for step in (1, 2, 3, 4):
        manager.save(step, made(step))
    damage(root, 4, "safetensors")
    damage(root, 3, "manifest")
    given = made(0)
    with caplog.at_level(logging.WARNING, "ckpt_cloud"):
        assert manager.restore(given) == 2
    assert given["n"] == 2
    assert given["model"]["w"].eq(2).all()
    assert [step for step, _ in manager.skipped] == [4, 3]
    assert "step 4" in caplog.text
    assert "step 3" in caplog.text
    assert manager.latest() == 4, "its manifest can be read"
    with pytest.raises(ChecksumMismatch):
        manager.restore(given, fallback=False)
    with pytest.raises(ChecksumMismatch):
        manager.restore(given, step=4)


def test_latest_passes_over_what_died_and_what_cannot_be_read(manage, made, root):
    manager = manage()
    for step in (1, 2, 3):
        manager.save(step, made(step))
    ckpt_cloud.delete(f"{root}/step-3")
    bridge.run(store_at(root).put("step-2/COMMIT", b'{"format": "ckpt-cl'))
    bridge.run(store_at(root).put(f"step-4/data/{'0' * 32}/0.safetensors", b"half"))
    assert manager.latest() == 1
    assert [step for step, _ in manager.skipped] == [2]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(manage, made, root):
    manager = manage()
    manager.save(1, made(1))
    manager.save(2, made(2))
    damage(root, 1, "manifest")
    damage(root, 2, "manifest")
    with pytest.raises(Damaged, match="step 2"):
        manager.restore(made(0), initial=f"{root}/elsewhere")


def test_dead_saves_alone_are_a_new_run(manage, made, root):
    bridge.run(store_at(root).put(f"step-4/data/{'0' * 32}/0.safetensors", b"half"))
    assert manage().restore(made(0)) is None


def test_the_store_must_answer(manage, made, store_faults):
    manager = manage(check=False)
    manager.save(1, made(1))
    store_faults.fail("list_children", error=StoreUnavailable)
    with pytest.raises(StoreUnavailable):
        manager.restore(made(0))
    store_faults.fail("get", key="COMMIT", error=PermissionDenied)
    with pytest.raises(PermissionDenied):
        manager.latest()


def test_model_only_and_exclude(manage, made):
    manager = manage()
    manager.save(1, made(1), only=("model",))
    manager.save(2, made(2), exclude=("optimizer",))
    given = made(0)
    assert manager.restore(given, step=1, only=("model",)) == 1
    assert (float(given["model"]["w"][0]), float(given["optimizer"]["m"][0]), given["n"]) == (1.0, 0.0, 0)
    assert manager.restore(given, exclude=("optimizer.*",)) == 2
    assert (float(given["model"]["w"][0]), float(given["optimizer"]["m"][0]), given["n"]) == (2.0, 0.0, 2)


def test_an_initial_load_is_not_a_resume(manage, made, root):
    pretrained = f"{root}-pretrained"
    ckpt_cloud.save({"model": made(7)["model"]}, checkpoint_id=pretrained)
    manager = manage()
    given = made(0)
    assert manager.restore(given, initial=pretrained, initial_only=("model",)) is None
    assert (float(given["model"]["w"][0]), given["n"]) == (7.0, 0)
    manager.save(5, made(5))
    assert manager.restore(given, initial=pretrained, initial_only=("model",)) == 5
    assert float(given["model"]["w"][0]) == 5.0


def test_metrics_and_metadata_stay_with_a_checkpoint(manage, made, root):
    with manage(user_metadata={"commit": "abc123", "config": {"lr": 0.1}}) as manager:
        for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0)):
            manager.save(step, made(step), {"loss": loss, "acc": torch.tensor(loss)}, user_metadata={"tag": step})
        manager.save(4, made(4))
    manager = manage()
    assert (manager.best("loss"), manager.best("acc", "max"), manager.best("none")) == (2, 1, None)
    assert manager.metrics(3) == {"loss": 2.0, "acc": 2.0}
    (info,) = [info for info in ckpt_cloud.list_checkpoints(root) if info.name == "step-2"]
    assert info.metrics == {"loss": 1.0, "acc": 1.0}
    with pytest.raises(CheckpointNotFound):
        manager.metrics(9)
    with pytest.raises(InvalidOption):
        manager.best("loss", "least")
    reader = ckpt_cloud.ObjectStoreReader(f"{root}/step-3")
    reader.read_metadata()
    assert reader.user_metadata == {"commit": "abc123", "config": {"lr": 0.1}, "tag": 3}


@pytest.mark.parametrize(
    "notes",
    [
        {"metrics": {"loss": float("nan")}},
        {"metrics": {"loss": "low"}},
        {"metrics": {"": 1.0}},
        {"metrics": {f"m{number}": 1.0 for number in range(300)}},
        {"user_metadata": {"config": object()}},
        {"user_metadata": {"huge": "x" * (5 << 20)}},
    ],
    ids=lambda notes: str(notes)[:40],
)
def test_notes_that_cannot_be_kept_are_refused_before_a_byte_is_sent(manage, made, store_faults, notes):
    manager = manage(check=False)
    store_faults.clear()
    with pytest.raises(InvalidOption):
        manager.save(1, made(1), **notes)
    assert not store_faults.operations


def test_best_is_found_though_the_list_is_stale(manage, made, root, settled):
    manager = manage()
    for step, loss in ((1, 1.0), (2, 2.0), (3, 3.0)):
        manager.save(step, made(step), {"loss": loss})
    settled(manager)
    ckpt_cloud.delete(f"{root}/step-1")
    assert manage().best("loss") == 2


@pytest.mark.parametrize(
    "hint", [None, b"", b"garbage\xff", b'{"steps": {"1": 7}}', b'{"steps":{"9":["zz",{}]},"format":"other"}']
)
def test_a_lost_or_damaged_list_of_steps_costs_requests_and_nothing_else(manage, made, root, settled, hint):
    with manage() as manager:
        for step in (1, 2):
            manager.save(step, made(step), {"loss": step})
        settled(manager)
    store = store_at(root)
    bridge.run(store.delete(["STEPS"]) if hint is None else store.put("STEPS", hint))
    manager = manage()
    assert manager.all_steps() == [1, 2]
    assert (manager.latest(), manager.best("loss", "max")) == (2, 2)


def test_a_stale_list_never_hides_the_newest(manage, made, root, settled):
    with manage() as manager:
        manager.save(1, made(1))
        settled(manager)
        stale = bridge.run(store_at(root).get("STEPS", limit=1 << 20))[0]
        manager.save(2, made(2))
        settled(manager)
    forgotten = msgspec.json.decode(stale)
    forgotten["steps"]["2"] = ["", {}]
    bridge.run(store_at(root).put("STEPS", msgspec.json.encode(forgotten)))
    manager = manage()
    assert manager.latest() == 2
    assert manager.restore(made(0)) == 2
    assert manager.all_steps(exact=True) == [1, 2]


def test_a_throttled_list_does_not_fail_a_save(manage, made, store_faults, settled):
    manager = manage()
    store_faults.fail("put", key="STEPS", error=ckpt_cloud.errors.Throttled, times=None)
    manager.save(1, made(1))
    settled(manager)
    assert manager.latest() == 1


def test_no_listing_on_the_way_of_a_save(manage, made, store_faults):
    manager = manage(check=False)
    store_faults.hang("list*", times=None)
    manager.save(1, made(1))
    manager.save(2, made(2))
    assert not [op for op in store_faults.operations if op.operation.startswith("list")]


def test_ten_thousand_steps_are_a_few_requests(manage, monkeypatch, nobodys_cloud):
    with FaultServer() as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        server.create_bucket("bucket")
        steps = {}
        for step in range(10_000):
            id_, loss = mint_id(1_700_000_000_000 + step, bytes(10)), float(abs(step - 7777))
            ref = ManifestRef(f"data/{id_}/manifest", 10, "0" * 64)
            register = registers.encode(Register("committed", id_, manifest=ref, metrics={"loss": loss}))
            server.dialect.objects[f"bucket/run/step-{step}/COMMIT"] = (register, '"e"', 0.0)
            steps[str(step)] = [id_, {"loss": loss}]
        del steps["123"]
        hint = msgspec.json.encode({"steps": steps, "format": "ckpt-cloud-steps", "version": 1})
        server.dialect.objects["bucket/run/STEPS"] = (hint, '"h"', 0.0)
        manager = manage("s3://bucket/run", check=False, read_only=True)
        assert manager.all_steps() == list(range(10_000))
        assert server.count("GET", "list-type") == 11
        assert len(server.requests) == 11 + 2, "the list of steps, and the one step that it does not have"
        assert manager.best("loss") == 7777
        assert len(server.requests) == 2 * 11 + 2 + 1, "one more look at the one that is best"
        manager.close()


@pytest.mark.parametrize(
    ("operation", "error"),
    [
        ("list_children", PermissionDenied),
        ("put", PermissionDenied),
        ("get", PermissionDenied),
        ("put", StoreUnavailable),
    ],
)
def test_the_start_up_check_tells_before_the_first_step(manage, store_faults, operation, error):
    store_faults.fail(operation, error=error, times=None)
    with pytest.raises(error):
        manage()


def test_the_start_up_check_on_a_store_without_conditional_writes(manage, rclone, monkeypatch):
    for name, value in rclone.env.items():
        monkeypatch.setenv(name, value)
    rclone.create_bucket("unsafe-manager")
    with pytest.raises(Unsupported, match="ignores"):
        manage("s3://unsafe-manager/run")


def test_who_may_not_delete_may_save(manage, made, store_faults):
    store_faults.fail("delete", error=PermissionDenied, times=None)
    manage().save(1, made(1))
    with pytest.raises(PermissionDenied):
        manage(keep=ckpt_cloud.LastN(1))


def test_read_only(manage, made, root, store_faults, settled):
    manager = manage()
    manager.save(1, made(1))
    settled(manager)
    store_faults.clear()
    reader = manage(read_only=True, keep=ckpt_cloud.LastN(1))
    assert reader.restore(made(0)) == 1
    assert reader.all_steps() == [1]
    with pytest.raises(InvalidOption, match="read-only"):
        reader.save(2, made(2))
    reader.close()
    assert not [op for op in store_faults.operations if op.operation.startswith(("put", "delete"))]


def test_a_checkpoint_that_is_deleted_while_it_is_loaded_is_passed_over(manage, made, root, store_faults):
    manager = manage()
    manager.save(1, made(1))
    manager.save(2, made(2))
    store_faults.fail("get_range", key="*", error=ckpt_cloud.errors.NotFound, times=1)
    assert manager.restore(made(0)) == 1
    ckpt_cloud.delete(f"{root}/step-2")
    with pytest.raises(CheckpointDeleted):
        manager.restore(made(0), step=2)


@pytest.mark.parametrize(
    "options", [{"when_busy": "queue"}, {"prefix": "a/b"}, {"nonsense": 1}, {"sigterm_grace_s": -1}]
)
def test_options_are_refused_at_once(manage, options):
    with pytest.raises(InvalidOption):
        manage(check=False, **options)


def test_a_closed_manager_saves_no_more(manage, made):
    manager = manage()
    manager.close()
    manager.close()
    with pytest.raises(InvalidOption, match="closed"):
        manager.save(1, made(1))


def test_signed_steps(manage, made, root):
    ed25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519")
    ours, theirs = ed25519.Ed25519PrivateKey.generate(), ed25519.Ed25519PrivateKey.generate()
    manager = manage(sign=ours, trusted_keys=ours.public_key())
    manager.save(1, made(1))
    assert manager.restore(made(0)) == 1
    with pytest.raises(ckpt_cloud.errors.SignatureError):
        manage(trusted_keys=theirs.public_key()).restore(made(0))
