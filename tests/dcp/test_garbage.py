"""The garbage collector rests while a save or load plans, works through a long wait, and is left as it was found."""

import asyncio
import gc
import os
import threading

import pytest
import torch

import ckpt_cloud
from ckpt_cloud import bridge, garbage

USUAL = gc.get_threshold()


def rests():
    assert gc.isenabled(), "it never stops altogether: others may need it"
    return gc.get_threshold()[0] > 100 * USUAL[0]


@pytest.fixture(autouse=True)
def as_it_was_found():
    assert gc.get_threshold() == USUAL
    yield
    found = gc.get_threshold()
    gc.set_threshold(*USUAL)
    assert found == USUAL


def test_it_rests_while_paused():
    with garbage.paused():
        assert rests()
        with garbage.paused():
            assert rests()
        assert rests()
    assert not rests()


def test_other_ranks_may_be_long_in_coming():
    """Cycles of other threads are found all the same."""

    class Loop:
        found = False

        def __init__(self):
            self.me = self

        def __del__(self):
            Loop.found = True

    with garbage.paused():
        Loop()
        kept = []
        while not Loop.found and len(kept) < 5_000_000:
            kept.append([])
    assert Loop.found


@pytest.mark.parametrize("thresholds", [(0, 10, 10), (5_000_000, 10, 10)])
def test_one_that_comes_more_rarely_yet_is_left_alone(thresholds):
    gc.set_threshold(*thresholds)
    with garbage.paused():
        assert gc.get_threshold() == thresholds
    assert gc.get_threshold() == thresholds
    gc.set_threshold(*USUAL)


def test_one_that_is_off_stays_off():
    gc.disable()
    with garbage.paused(), garbage.resumed():
        assert not gc.isenabled()
    assert not gc.isenabled()
    gc.enable()


def test_what_somebody_sets_meanwhile_stays():
    with garbage.paused():
        gc.set_threshold(500, 5, 5)
        with garbage.paused():
            pass
    assert gc.get_threshold() == (500, 5, 5)
    gc.set_threshold(*USUAL)


def test_it_works_through_a_wait():
    with garbage.paused():
        with garbage.paused(), garbage.resumed():
            assert not rests()
        assert rests()


def test_after_an_error_it_works():
    with pytest.raises(RuntimeError), garbage.paused():
        raise RuntimeError
    assert not rests()


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
        assert rests(), "the other still pauses it"
    over.set()
    thread.join()
    assert not rests()


def test_a_child_that_never_comes_back_has_it_work():
    """As multiprocessing's do, forked from within a save by a planner or a state of the user's."""
    with garbage.paused():
        child = os.fork()
        if child == 0:
            seen = []
            try:
                seen.append(rests())
                with garbage.paused():
                    seen.append(rests())
                seen.append(rests())
            finally:
                os._exit(0 if seen == [False, True, False] else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert rests()


def test_a_long_wait_for_a_store_does_not_go_on_without_it(monkeypatch):
    monkeypatch.setattr(bridge, "_UNCOLLECTED_S", 0)

    async def until_it_works():
        while rests():
            await asyncio.sleep(0)

    with garbage.paused():
        bridge.run(until_it_works())
        assert rests()


class Watching:
    """A part of a state that notes whether the collector rests while it is asked for its own."""

    def __init__(self):
        self.seen = set()

    def state_dict(self):
        self.seen.add(rests())
        return {"weight": torch.zeros(4)}

    def load_state_dict(self, state):
        self.seen.add(rests())


def test_planning_goes_undisturbed(file_url):
    part = Watching()
    ckpt_cloud.save({"part": part}, checkpoint_id=file_url)
    ckpt_cloud.load({"part": part}, checkpoint_id=file_url)
    assert part.seen == {True}
    assert not rests()


def test_a_failed_save_leaves_it_at_work(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ckpt_cloud.CkptCloudError):
        ckpt_cloud.save({"weight": torch.zeros(1)}, checkpoint_id=f"file://{tmp_path}/file/inside")
    assert not rests()
