"""The garbage collector rests while a save or load plans, works through a long wait, and is left as it was found."""

import asyncio
import gc
import threading

import pytest
import torch

import ckpt_cloud
from ckpt_cloud import bridge, garbage


@pytest.fixture(autouse=True)
def collecting():
    assert gc.isenabled()
    yield
    gc.enable()


def test_it_rests_while_paused():
    with garbage.paused():
        assert not gc.isenabled()
        with garbage.paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_one_that_was_off_stays_off():
    gc.disable()
    with garbage.paused(), garbage.resumed():
        assert not gc.isenabled()
    assert not gc.isenabled()


def test_it_works_through_a_wait():
    with garbage.paused():
        with garbage.paused(), garbage.resumed():
            assert gc.isenabled()
        assert not gc.isenabled()


def test_after_an_error_it_works():
    with pytest.raises(RuntimeError), garbage.paused():
        raise RuntimeError
    assert gc.isenabled()


def test_threads_pause_it_apart():
    paused, over = threading.Event(), threading.Event()

    def other():
        with garbage.paused():
            paused.set()
            over.wait(30)

    thread = threading.Thread(target=other)
    thread.start()
    assert paused.wait(30)
    with garbage.paused():
        pass
    with garbage.resumed():
        assert not gc.isenabled(), "the other still pauses it"
    over.set()
    thread.join()
    assert gc.isenabled()


def test_a_long_wait_for_a_store_does_not_go_on_without_it(monkeypatch):
    monkeypatch.setattr(bridge, "_UNCOLLECTED_S", 0)

    async def until_it_works():
        while not gc.isenabled():
            await asyncio.sleep(0)

    with garbage.paused():
        bridge.run(until_it_works())
        assert not gc.isenabled()


class Watching:
    """A part of a state that notes whether the collector works while it is asked for its own."""

    def __init__(self):
        self.seen = set()

    def state_dict(self):
        self.seen.add(gc.isenabled())
        return {"weight": torch.zeros(4)}

    def load_state_dict(self, state):
        self.seen.add(gc.isenabled())


def test_planning_goes_undisturbed(file_url):
    part = Watching()
    ckpt_cloud.save({"part": part}, checkpoint_id=file_url)
    ckpt_cloud.load({"part": part}, checkpoint_id=file_url)
    assert part.seen == {False}
    assert gc.isenabled()


def test_a_failed_save_leaves_it_at_work(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ckpt_cloud.CkptCloudError):
        ckpt_cloud.save({"weight": torch.zeros(1)}, checkpoint_id=f"file://{tmp_path}/file/inside")
    assert gc.isenabled()
