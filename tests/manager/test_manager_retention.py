"""Deleting in the background: only what counts, never the last good one, again when it failed."""

import pytest
import torch

import ckpt_cloud
from ckpt_cloud import BestN, EveryNSteps, LastN, bridge
from ckpt_cloud.errors import PermissionDenied, StoreUnavailable
from ckpt_cloud.options import StoreOptions
from ckpt_cloud.stores import open_store, parse_url

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def run(manager, made, settled, *steps, loss=None):
    for step in steps:
        manager.save(step, made(step), {"loss": loss(step)} if loss else None)
        settled(manager)


def objects_under(url):
    async def listed():
        return sorted([info.key async for info in open_store(parse_url(url), StoreOptions()).list()])

    return bridge.run(listed())


def test_policies_apply_after_each_save(manage, made, settled, root):
    manager = manage(keep=LastN(2) | EveryNSteps(4) | BestN(1, "loss"))
    run(manager, made, settled, 1, 2, 3, 4, 5, 6, 7, loss=lambda step: abs(step - 2))
    assert manager.all_steps() == [2, 4, 6, 7]
    assert objects_under(f"{root}/step-1") == ["COMMIT"], "a register that says deleted, and no data"


def test_without_a_policy_nothing_goes(manage, made, settled):
    manager = manage()
    run(manager, made, settled, 1, 2, 3)
    assert manager.all_steps() == [1, 2, 3]


def test_only_committed_checkpoints_count_and_the_last_good_one_stays(manage, made, settled, root, store_faults):
    manager = manage(keep=LastN(1))
    run(manager, made, settled, 1)
    for step in (2, 3):
        store_faults.fail("put", key="*.safetensors")
        with pytest.raises(StoreUnavailable):
            manager.save(step, made(step))
        settled(manager)
    assert manager.restore(made(0)) == 1
    run(manager, made, settled, 4)
    assert manager.all_steps() == [4]


def test_a_damaged_newest_does_not_count_as_the_last(manage, made, settled, root):
    with manage() as first:
        run(first, made, settled, 1, 2)
    ckpt_cloud.save(made(9), checkpoint_id=f"{root}/step-9")
    (manifest,) = [key for key in objects_under(f"{root}/step-9") if key.endswith("manifest")]
    bridge.run(open_store(parse_url(root), StoreOptions()).put(f"step-9/{manifest}", b"damaged"))
    manager = manage(keep=LastN(1))
    run(manager, made, settled, 3)
    assert manager.restore(made(0)) == 3
    assert [step for step, _ in manager.skipped] == [9]
    assert manager.all_steps() == [3, 9], "it is for people to say what becomes of it"


def test_what_others_deleted_does_not_count(manage, made, settled, root):
    manager = manage(keep=LastN(2))
    run(manager, made, settled, 1, 2)
    ckpt_cloud.delete(f"{root}/step-2")
    run(manager, made, settled, 3)
    assert manager.all_steps() == [1, 3], "step 2 does not count any more, so step 1 is one of the last two"


def test_a_delete_that_fails_is_not_fatal_and_tried_again(manage, made, settled, store_faults):
    manager = manage(keep=LastN(1))
    store_faults.fail("delete", error=PermissionDenied, times=1)
    run(manager, made, settled, 1, 2)
    assert set(manager.failed_deletions) == {1}
    run(manager, made, settled, 3)
    assert manager.failed_deletions == {}
    assert manager.all_steps() == [3]


def test_deleting_does_not_hold_up_the_next_save(manage, made, settled, store_faults):
    manager = manage(keep=LastN(1))
    store_faults.hang("delete", times=None)
    manager.save(1, made(1))
    manager.save(2, made(2))
    store_faults.wait_for("delete")
    manager.save(3, made(3))
    store_faults.release()
    settled(manager)
    assert manager.all_steps() == [3]


def test_a_new_manager_goes_on_where_the_last_one_stopped(manage, made, settled):
    with manage() as first:
        run(first, made, settled, 1, 2, 3, loss=float)
    manager = manage(keep=LastN(1) | BestN(1, "loss"))
    run(manager, made, settled, 4, loss=float)
    assert manager.all_steps() == [1, 4]


def test_a_stale_list_does_not_mislead_a_policy(manage, made, settled, root):
    """By the list, step 1 is best; others deleted it, so step 2 is, and must stay."""
    with manage() as first:
        run(first, made, settled, 1, 2, 3, 4, loss=float)
    ckpt_cloud.delete(f"{root}/step-1")
    manager = manage(keep=LastN(1) | BestN(1, "loss"))
    run(manager, made, settled, 5, loss=float)
    assert manager.all_steps() == [2, 5]


def test_a_step_that_is_being_loaded_stays(manage, made, settled, store_faults):
    manager = manage(keep=LastN(1))
    run(manager, made, settled, 1)
    manager._janitor.pin(1, on=True)
    run(manager, made, settled, 2)
    assert manager.all_steps() == [1, 2]
    manager._janitor.pin(1, on=False)
    run(manager, made, settled, 3)
    assert manager.all_steps() == [3]


def test_a_deleted_step_can_be_saved_again(manage, made, settled):
    manager = manage(keep=LastN(1))
    run(manager, made, settled, 1, 2)
    run(manager, made, settled, 1)
    assert manager.restore(made(0)) == 2
    given = {"model": {"w": torch.zeros(500)}}
    assert manager.latest() == 2
    assert manager.restore(given, only=("model",)) == 2
