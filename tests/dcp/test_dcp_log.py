"""DCP's log costs nothing while nobody reads it, loses nothing where somebody does, and is left as it was found."""

import logging
import os
import threading

import pytest
import torch
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint import logger as dcp_logger

import ckpt_cloud
from ckpt_cloud import dcp_log

LOG = dcp_logger._dcp_logger
LEVEL = LOG.level


def speaks():
    return LOG.isEnabledFor(logging.DEBUG)


@pytest.fixture(autouse=True)
def as_it_was_found(monkeypatch):
    # pytest would read along.
    monkeypatch.setattr(LOG, "handlers", [logging.NullHandler()])
    monkeypatch.setattr(LOG, "addHandler", lambda handler: None)
    assert LOG.level == LEVEL
    yield
    found = LOG.level
    LOG.setLevel(LEVEL)
    assert found == LEVEL


class Reading(logging.Handler):
    def __init__(self):
        super().__init__()
        self.calls = set()

    def emit(self, record):
        self.calls.add(record.msg["func_name"])


@pytest.fixture
def reading(as_it_was_found):
    handler = Reading()
    LOG.handlers.append(handler)
    return handler


class Watching:
    """A part of a state that notes whether DCP's log speaks while it is asked for its own."""

    def __init__(self):
        self.seen = []

    def state_dict(self):
        self.seen.append(speaks())
        return {"weight": torch.zeros(4)}

    def load_state_dict(self, state): ...


def test_a_save_is_not_noted_for_nobody(file_url):
    part = Watching()
    ckpt_cloud.save({"part": part}, checkpoint_id=file_url)
    assert part.seen == [False]
    assert speaks()


def test_who_reads_it_misses_nothing(file_url, reading):
    ckpt_cloud.save({"weight": torch.zeros(4)}, checkpoint_id=file_url)
    assert {"save", "_stateful_to_state_dict.weight", "global_step"} <= reading.calls


class WaitingPlanner(DefaultSavePlanner):
    """Plans once it may, and notes whether DCP's log speaks then."""

    def __init__(self):
        super().__init__()
        self.may, self.spoke = threading.Event(), None

    def create_global_plan(self, plans):
        assert self.may.wait(30)
        self.spoke = speaks()
        return super().create_global_plan(plans)


def test_an_asynchronous_save_is_not_noted_until_its_end(file_url):
    part, planner = Watching(), WaitingPlanner()
    saving = ckpt_cloud.async_save({"part": part}, checkpoint_id=file_url, planner=planner)
    assert part.seen == [False]
    planner.may.set()
    saving.result()
    assert planner.spoke is False
    assert speaks()


def test_a_failed_save_leaves_it_speaking(tmp_path):
    (tmp_path / "file").touch()
    for save in (ckpt_cloud.save, lambda *a, **k: ckpt_cloud.async_save(*a, **k).result()):
        with pytest.raises(ckpt_cloud.CkptCloudError):
            save({"weight": torch.zeros(1)}, checkpoint_id=f"file://{tmp_path}/file/inside")
        assert speaks()


def test_staging_that_fails_leaves_it_speaking(file_url):
    class Broken:
        def state_dict(self):
            raise RuntimeError("no state")

        def load_state_dict(self, state): ...

    with pytest.raises(RuntimeError, match="no state"):
        ckpt_cloud.async_save({"part": Broken()}, checkpoint_id=file_url)
    assert speaks()


def test_it_speaks_again_after_the_last_of_several():
    muted, over = threading.Event(), threading.Event()

    def other():
        with dcp_log.muted():
            muted.set()
            over.wait(30)

    thread = threading.Thread(target=other)
    thread.start()
    assert muted.wait(30)
    with dcp_log.muted():
        pass
    assert not speaks()
    over.set()
    thread.join()
    assert speaks()


def test_a_level_that_somebody_sets_meanwhile_stays():
    with dcp_log.muted():
        LOG.setLevel(logging.ERROR)
    assert LOG.level == logging.ERROR
    LOG.setLevel(LEVEL)


def test_a_child_forked_meanwhile_speaks():
    with dcp_log.muted():
        child = os.fork()
        if child == 0:
            os._exit(0 if speaks() else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert not speaks()
