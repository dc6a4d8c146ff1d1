"""One asynchronous save at a time in a process, whoever begins them."""

import os
import secrets
import threading

import pytest
import torch

import ckpt_cloud
from ckpt_cloud import background
from ckpt_cloud.errors import SaveInFlight


class Staged:
    """A part of a state that is staged once it may be."""

    def __init__(self):
        self.asked, self.may = threading.Event(), threading.Event()

    def state_dict(self):
        self.asked.set()
        assert self.may.wait(30)
        return {"weight": torch.ones(4)}

    def load_state_dict(self, state): ...


def new_url():
    return f"memory://{secrets.token_hex(6)}/run"


def saving(part, results):
    """A thread that begins to save it."""

    def run():
        results.append(ckpt_cloud.async_save({"part": part}, checkpoint_id=new_url(), no_dist=True))

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_one_that_is_still_being_staged_by_another_thread_is_in_flight():
    part, results = Staged(), []
    thread = saving(part, results)
    assert part.asked.wait(30)
    with pytest.raises(SaveInFlight, match="still under way"):
        ckpt_cloud.async_save({"w": torch.ones(4)}, checkpoint_id=new_url(), no_dist=True, in_flight="refuse")
    part.may.set()
    thread.join()
    results[0].result()
    ckpt_cloud.async_save({"w": torch.ones(4)}, checkpoint_id=new_url(), no_dist=True, in_flight="refuse").result()


def test_threads_wait_for_each_other(store_faults):
    store_faults.hang("put", key="*.safetensors")
    first, second, results = Staged(), Staged(), []
    threads = [saving(first, results)]
    assert first.asked.wait(30)
    threads.append(saving(second, results))
    first.may.set()
    threads[0].join()
    assert not results[0].done()
    assert not second.asked.is_set(), "there is one staged copy at a time"
    second.may.set()
    store_faults.release()
    for thread in threads:
        thread.join()
    assert results[0].done()
    results[1].result()


def test_a_forked_child_waits_for_nobody(store_faults):
    """The thread that would end its parent's save is not in it."""
    store_faults.hang("put", key="*.safetensors")
    running = ckpt_cloud.async_save({"w": torch.ones(4)}, checkpoint_id=new_url(), no_dist=True)
    child = os.fork()
    if child == 0:
        begun = False
        try:
            with background.turn("refuse"):
                begun = True
        finally:
            os._exit(0 if begun else 1)
    assert os.waitpid(child, 0)[1] == 0
    store_faults.release()
    running.result()
