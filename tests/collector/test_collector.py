"""What the collector takes, what it leaves alone, and what it says."""

import os
import secrets
import threading
import time
from contextlib import contextmanager
from datetime import timedelta
from types import SimpleNamespace

import pytest

import ckpt_cloud
from ckpt_cloud import collector
from ckpt_cloud.errors import (
    AttemptAborted,
    CheckpointChanged,
    CheckpointDeleted,
    CheckpointIncomplete,
    CheckpointNotFound,
    CheckpointPerRank,
    CommitStateUnknown,
    InvalidOption,
    StoreUnavailable,
    Unsupported,
)
from ckpt_cloud.format import register as registers
from ckpt_cloud.format.layout import mint_id
from ckpt_cloud.format.register import Register
from ckpt_cloud.stores.capabilities import Capabilities
from ckpt_cloud.testing import Faults
from ckpt_cloud.workers import in_thread
from tests.collector.conftest import state

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
]

NOW = timedelta(0)


def minted(hours_ago):
    return mint_id(int((time.time() - hours_ago * 3600) * 1000), secrets.token_bytes(10))


def test_nothing_young_is_touched(run):
    run.save("it", 1)
    run.save("it", 2, overwrite=True)
    run.put(f"dead/data/{minted(0)}/0.safetensors")
    before = run.stored()
    assert ckpt_cloud.gc(run.root).objects == []
    assert run.stored() == before


def test_what_is_not_ours_is_left_alone(run):
    run.save("it", 1)
    strangers = ["notes.txt", "it/readme.md", "it/data/notes.txt", "it/data/short/0.safetensors", "COMMIT.bak"]
    by_hash = "0" * 8 + "cdef" * 6
    strangers += [f"it/cache/data/{by_hash}/part.bin", f"sets/data/{by_hash}/manifest.json"]
    for key in strangers:
        run.put(key)
    ckpt_cloud.gc(run.root, older_than=NOW)
    assert set(strangers) <= set(run.stored())
    assert run.load("it") == 1


def test_everything_of_a_dead_save_goes(run):
    dead = minted(30)
    for name in ("0.safetensors", "manifest", "probe", "something-newer"):
        run.put(f"dead/data/{dead}/{name}")
    run.put(f"dead/data/ab-{dead}/1.safetensors")
    collected = ckpt_cloud.gc(run.root, older_than=NOW)
    assert len(collected.objects) == 5
    assert collected.size_bytes == 5
    assert run.stored() == ["dead/COMMIT"], "the fence stays"
    assert run.load("dead") is CheckpointDeleted


def test_a_dry_run_touches_nothing(run):
    run.save("it", 1)
    run.save("it", 2, overwrite=True)
    before = run.stored()
    told = ckpt_cloud.gc(run.root, older_than=NOW, dry_run=True)
    assert told.dry_run
    assert len(told.objects) == 2
    assert run.stored() == before


def test_the_root_may_be_the_checkpoint(run):
    run.save("it", 1)
    run.save("it", 2, overwrite=True)
    assert len(ckpt_cloud.gc(run.url("it"), older_than=NOW).objects) == 2
    assert run.load("it") == 2


def test_a_damaged_checkpoint_is_skipped_with_its_reason(run):
    run.save("good", 1)
    run.put("good-too/COMMIT", run.read("good/COMMIT"))
    run.put(f"good-too/data/{minted(50)}/0.safetensors")
    run.put("bad/COMMIT", b"{}")
    run.put(f"bad/data/{minted(50)}/0.safetensors")
    before = run.stored()
    collected = ckpt_cloud.gc(run.root, older_than=NOW)
    assert sorted(url.rpartition("/")[2] for url, _ in collected.skipped) == ["bad", "good-too"]
    assert run.stored() == before


def test_what_was_replaced_lately_may_still_be_loading(new_run, tmp_path, monkeypatch):
    """A week-old checkpoint that was replaced a minute ago is not garbage yet; the one before it is."""
    run = new_run(f"file://{tmp_path}/run")
    real = time.time_ns
    for days, value in ((9, 1), (7, 2), (0, 3)):
        monkeypatch.setattr("time.time_ns", lambda days=days: real() - days * 86_400_000_000_000)
        run.save("it", value, overwrite=True)
        if days:
            for path in (tmp_path / "run/it/data").rglob("*"):
                then = min(path.stat().st_mtime, time.time() - days * 86_400)
                os.utime(path, (then, then))
    monkeypatch.undo()
    told = ckpt_cloud.gc(run.root, older_than=timedelta(hours=1))
    assert len(told.objects) == 2
    assert len(run.stored()) == 5
    assert len(ckpt_cloud.gc(run.root, older_than=NOW).objects) == 2
    assert run.load("it") == 3


@contextmanager
def stalled_save(run, name, value, *, overwrite=False):
    """A save in a thread that hangs at its manifest until the block ends; its outcome is there after the block."""
    faults = Faults()
    outcome = []

    def save():
        try:
            run.save(name, value, overwrite=overwrite)
            outcome.append("saved")
        except ckpt_cloud.CkptCloudError as error:
            outcome.append(type(error))

    with faults.everywhere():
        faults.hang("put", "*manifest", times=1)
        thread = threading.Thread(target=save)
        thread.start()
        faults.wait_for("put", "*manifest")
        yield SimpleNamespace(outcome=outcome, faults=faults, thread=thread)
        faults.release()
        thread.join()


def test_a_save_that_wakes_after_the_collector_is_told(run):
    """Its data is gone, so it must never become visible."""
    with stalled_save(run, "it", 1) as save:
        assert ckpt_cloud.gc(run.root, older_than=NOW).objects
    assert save.outcome == [AttemptAborted]
    assert run.load("it") is CheckpointDeleted
    run.save("it", 2)
    assert run.load("it") == 2


def test_a_save_older_than_the_grace_age_that_still_stores_is_not_given_up(new_run, tmp_path, monkeypatch):
    run = new_run(f"file://{tmp_path}/run")
    real = time.time_ns
    monkeypatch.setattr("time.time_ns", lambda: real() - 3 * 3_600_000_000_000)
    with stalled_save(run, "it", 1) as save:
        monkeypatch.undo()
        dead = f"it/data/{minted(30)}/0.safetensors"
        run.put(dead)
        os.utime(tmp_path / "run" / dead, (time.time() - 100_000,) * 2)
        assert [each.key for each in ckpt_cloud.gc(run.root, older_than=timedelta(hours=1)).objects] == [dead]
    assert save.outcome == ["saved"]
    assert run.load("it") == 1


def test_an_overwrite_that_wakes_after_a_delete_is_told(run):
    """The deleter took its data too, as it was there; it must not bring the checkpoint back."""
    run.save("it", 1)
    with stalled_save(run, "it", 2, overwrite=True) as save:
        ckpt_cloud.delete(run.url("it"))
        assert run.load("it") is CheckpointDeleted
    assert save.outcome == [AttemptAborted]
    assert run.load("it") is CheckpointDeleted


def test_a_clock_behind_a_fence_is_told_before_a_byte_is_sent(run):
    run.put("it/COMMIT", registers.encode(Register("aborted", minted(-1), minted(-1))))
    faults = Faults()
    with faults.everywhere(), pytest.raises(AttemptAborted, match="fenced off"):
        run.save("it", 1)
    assert not [each for each in faults.operations if each.operation.startswith("put")]


def test_a_running_save_that_is_above_the_fence_keeps_what_looks_old(run, monkeypatch):
    """By the store's clock it is older than the grace age, by its own not: it may still commit."""
    real = time.time_ns
    monkeypatch.setattr("time.time_ns", lambda: real() + 3_600_000_000_000)
    with stalled_save(run, "it", 1) as save:
        run.put(f"it/data/{minted(30)}/0.safetensors")
        assert len(ckpt_cloud.gc(run.root, older_than=NOW).objects) == 1
    assert save.outcome == ["saved"]
    assert run.load("it") == 1


def test_a_save_that_commits_between_the_look_and_the_fence_keeps_its_data(run, monkeypatch):
    real = collector.move_register

    async def late(*args, **kwargs):
        await in_thread(finish_the_save)
        return await real(*args, **kwargs)

    monkeypatch.setattr(collector, "move_register", late)
    with stalled_save(run, "it", 1) as save:

        def finish_the_save():
            save.faults.release()
            save.thread.join()

        assert ckpt_cloud.gc(run.root, older_than=NOW).objects == []
    assert save.outcome == ["saved"]
    assert run.load("it") == 1


def test_a_collector_beside_a_younger_save(new_run, tmp_path, monkeypatch):
    """It raises the fence of what the save is about to replace; the save goes on."""
    run = new_run(f"file://{tmp_path}/run")
    real = time.time_ns
    for hours, value in ((3, 1), (2, 2)):
        monkeypatch.setattr("time.time_ns", lambda hours=hours: real() - hours * 3_600_000_000_000)
        run.save("it", value, overwrite=True)
    monkeypatch.undo()
    for path in tmp_path.rglob("*"):
        os.utime(path, (time.time() - 7200,) * 2)
    with stalled_save(run, "it", 3, overwrite=True) as save:
        assert len(ckpt_cloud.gc(run.root, older_than=timedelta(hours=1)).objects) == 2
        assert run.load("it") == 2
    assert save.outcome == ["saved"]
    assert run.load("it") == 3


def test_delete(run):
    run.save("it", 1)
    run.save("other", 2)
    ckpt_cloud.delete(run.url("it"))
    assert run.load("it") is CheckpointDeleted
    assert [key for key in run.stored() if key.startswith("it/")] == ["it/COMMIT"]
    assert run.load("other") == 2
    ckpt_cloud.delete(run.url("it"))
    run.save("it", 3)
    assert run.load("it") == 3
    with pytest.raises(CheckpointNotFound):
        ckpt_cloud.delete(run.url("nothing"))
    run.put(f"dead/data/{minted(1)}/0.safetensors")
    with pytest.raises(CheckpointIncomplete):
        ckpt_cloud.delete(run.url("dead"))
    assert ckpt_cloud.latest(run.root) == run.url("it")


def test_a_commit_that_never_answered_is_settled_later(run):
    faults = Faults()
    for applied in (True, False):
        name = f"it-{applied}"
        faults.fail("put", "COMMIT", StoreUnavailable, times=1000, applied=applied)
        faults.fail("get", "COMMIT", StoreUnavailable, times=1000, after=1)
        with faults.everywhere(), pytest.raises(CommitStateUnknown):
            run.save(name, 7)
        faults.clear()
        settled = ckpt_cloud.resolve(run.url(name))
        assert settled.state == ("committed" if applied else "aborted")
        assert settled.name == name
        assert run.load(name) == (7 if applied else CheckpointDeleted)
        ckpt_cloud.gc(run.root, older_than=NOW)
        assert run.load(name) == (7 if applied else CheckpointDeleted)
        run.save(name, 8, overwrite=True)
        assert run.load(name) == 8


def test_settling_covers_saves_of_clocks_that_are_ahead(run, monkeypatch):
    """Else the lost write could still land, after somebody was told that it did not."""
    real = time.time_ns
    monkeypatch.setattr("time.time_ns", lambda: real() + 3_600_000_000_000)
    faults = Faults()
    faults.fail("put", "COMMIT", StoreUnavailable, times=1000)
    with faults.everywhere(), pytest.raises(CommitStateUnknown) as unknown:
        run.save("it", 7)
    monkeypatch.undo()
    (key,) = [key for key in run.stored() if key.endswith("manifest")]
    attempt = key.split("/")[-2]
    assert attempt in str(unknown.value)
    assert ckpt_cloud.resolve(run.url("it")).state == "aborted"
    register = registers.decode(run.read("it/COMMIT"), "it")
    assert register.fence > attempt


def test_ranks_that_do_not_coordinate_are_deleted_and_collected_too(run):
    url = run.url("it")
    for rank in range(2):
        for value in (1, 2):
            writer = ckpt_cloud.ObjectStoreWriter(f"{url}/rank-{rank:05d}", overwrite=True)
            ckpt_cloud.save(state(value), storage_writer=writer)
    collected = ckpt_cloud.gc(run.root, older_than=NOW)
    assert len(collected.objects) == 4
    assert set(run.stored()) == run.needed()
    assert run.load("it/rank-00001") == 2
    ckpt_cloud.delete(url)
    assert run.stored() == ["it/rank-00000/COMMIT", "it/rank-00001/COMMIT"]
    assert run.load("it/rank-00001") is CheckpointDeleted


def test_what_becomes_of_a_save_for_all_says_nothing_of_those_of_single_ranks(run):
    """One that dies, is collected or settled at the URL under which each rank has its own; loads find these."""
    ckpt_cloud.save(state(1), checkpoint_id=run.url("it"), use_collectives=False)
    with pytest.raises(CheckpointPerRank):
        ckpt_cloud.resolve(run.url("it"))
    run.put(f"it/data/{minted(30)}/0.safetensors")
    assert run.load("it") == 1
    assert len(ckpt_cloud.gc(run.root, older_than=NOW).objects) == 1
    assert "it/COMMIT" in run.stored(), "the fence"
    assert run.load("it") == 1
    assert run.load("it/rank-00000") == 1
    ckpt_cloud.delete(run.url("it"))
    assert run.load("it/rank-00000") is CheckpointDeleted


def test_a_checkpoint_whose_name_is_like_a_ranks_is_none(run):
    run.save("it", 1)
    run.save("it/rank-best", 2)
    ckpt_cloud.delete(run.url("it"))
    assert run.load("it") is CheckpointDeleted
    assert run.load("it/rank-best") == 2


def test_where_nobody_saved_there_is_nothing_to_settle(run):
    with pytest.raises(CheckpointNotFound):
        ckpt_cloud.resolve(run.url("typo"))
    assert run.stored() == []


def test_checkpoints_within_and_below_each_other_are_kept_apart(run):
    """A root that is a checkpoint itself, one below it, and one that is called `data`."""
    for name, value in (("it", 1), ("it/best", 2), ("it/data", 3), ("it/data/deep", 4)):
        run.save(name, value)
    dead = minted(30)
    run.put(f"it/best/data/{dead}/0.safetensors")
    run.put(f"it/data/data/{dead}/0.safetensors")
    collected = ckpt_cloud.gc(run.url("it"), older_than=NOW)
    assert sorted(each.key.split("/")[0] for each in collected.objects) == ["best", "data"]
    ckpt_cloud.delete(run.url("it"))
    assert [run.load(name) for name in ("it", "it/best", "it/data", "it/data/deep")] == [CheckpointDeleted, 2, 3, 4]
    assert set(run.stored()) == run.needed()


def test_spread_keys_are_collected_like_others(run):
    writer = ckpt_cloud.ObjectStoreWriter(run.url("it"), transfer=ckpt_cloud.TransferOptions(spread=2))
    ckpt_cloud.save(state(1), storage_writer=writer)
    assert any("-" in key for key in run.stored())
    run.save("it", 2, overwrite=True)
    assert len(ckpt_cloud.gc(run.root, older_than=NOW).objects) == 2
    assert run.load("it") == 2
    ckpt_cloud.delete(run.url("it"))
    assert run.stored() == ["it/COMMIT"]


def test_no_more_checkpoints_are_held_in_memory_than_are_looked_at_together(run):
    """However many there are below the root: each name has a listing of its own."""
    for number in range(30):
        run.put(f"step-{number}/data/{minted(30)}/0.safetensors")
    faults = Faults()
    with faults.everywhere():
        assert len(ckpt_cloud.gc(run.root, older_than=NOW).objects) == 30
    listed = [operation.key for operation in faults.operations if operation.operation == "list"]
    assert sorted(listed) == sorted(f"step-{number}" for number in range(30))


def test_where_conditions_are_ignored_nothing_is_collected_or_deleted(run, monkeypatch):
    """A fence that overwrites whatever is there could undo a commit."""
    run.save("it", 1)
    run.save("it", 2, overwrite=True)

    async def none(store):
        return Capabilities(conditional_create=False, conditional_replace=False)

    monkeypatch.setattr("ckpt_cloud.stores.native.NativeStore.capabilities", none)
    before = run.stored()
    for act in (ckpt_cloud.delete, ckpt_cloud.resolve, lambda url: ckpt_cloud.gc(url, older_than=NOW)):
        with pytest.raises(Unsupported, match="ignores conditional writes"):
            act(run.url("it"))
    assert len(ckpt_cloud.gc(run.root, older_than=NOW, dry_run=True).objects) == 2
    assert run.stored() == before
    assert len(ckpt_cloud.gc(run.root, older_than=NOW, allow_unsafe_commit=True).objects) == 2
    assert run.load("it") == 2


def test_a_negative_age(run):
    with pytest.raises(InvalidOption):
        ckpt_cloud.gc(run.root, older_than=timedelta(hours=-1))


def test_on_files(tmp_path):
    url = f"file://{tmp_path}/run"
    state = {"note": "x" * 100_000}
    ckpt_cloud.save(state, checkpoint_id=f"{url}/it")
    writer = ckpt_cloud.ObjectStoreWriter(f"{url}/it", overwrite=True)
    ckpt_cloud.save(state, storage_writer=writer)
    draft = tmp_path / f"run/it/data/{minted(5)}/0.safetensors#1"
    draft.parent.mkdir(parents=True)
    draft.write_bytes(b"x")
    os.utime(draft, (time.time() - 7200,) * 2)
    collected = ckpt_cloud.gc(url, older_than=NOW)
    assert len(collected.objects) == 2
    assert len(collected.uploads) == 1
    assert not draft.exists()
    ckpt_cloud.load(state, checkpoint_id=f"{url}/it")


def test_an_upload_younger_than_the_grace_age_is_left_alone(tmp_path):
    draft = tmp_path / f"run/it/data/{minted(0)}/0.safetensors#1"
    draft.parent.mkdir(parents=True)
    draft.write_bytes(b"x")
    os.utime(draft, (time.time() - 1800,) * 2)
    assert ckpt_cloud.gc(tmp_path / "run", older_than=timedelta(hours=1)).uploads == []
    assert draft.exists()
    assert len(ckpt_cloud.gc(tmp_path / "run", older_than=timedelta(minutes=20)).uploads) == 1
    assert not draft.exists()


@pytest.mark.parametrize(("meanwhile", "error"), [("replaced", CheckpointChanged), ("deleted", CheckpointDeleted)])
def test_a_load_whose_data_is_collected_under_it(run, meanwhile, error):
    """Replaced or deleted alone, the old one is read to its end; it ends when its data goes."""
    run.save("it", 1)
    faults = Faults()
    outcome = []
    with faults.everywhere():
        faults.hang("get_range", "*", times=1)
        thread = threading.Thread(target=lambda: outcome.append(run.load("it")))
        thread.start()
        faults.wait_for("get_range", "*")
        if meanwhile == "deleted":
            ckpt_cloud.delete(run.url("it"))
        else:
            run.save("it", 2, overwrite=True)
            for key in set(run.stored()) - run.needed():
                run.remove(key)
        faults.release()
        thread.join()
    assert outcome == [error]


def test_a_load_reads_the_checkpoint_that_it_began_with(run):
    run.save("it", 1)
    faults = Faults()
    outcome = []
    with faults.everywhere():
        faults.hang("get_range", "*", times=1)
        thread = threading.Thread(target=lambda: outcome.append(run.load("it")))
        thread.start()
        faults.wait_for("get_range", "*")
        run.save("it", 2, overwrite=True)
        ckpt_cloud.gc(run.root)
        faults.release()
        thread.join()
    assert outcome == [1]
    assert run.load("it") == 2
