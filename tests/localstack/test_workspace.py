"""Where servers keep their data."""

import os
import shutil

import pytest

from localstack import workspace

HOUR_AGO = 3600


@pytest.fixture
def parent(tmp_path, monkeypatch):
    monkeypatch.setattr(workspace, "_parent", lambda: tmp_path)
    return tmp_path


def age(directory):
    lock = directory / "owner.lock"
    then = lock.stat().st_mtime - HOUR_AGO
    os.utime(lock, (then, then))


def test_a_temporary_one_goes_and_a_kept_one_stays(parent):
    temporary, kept = workspace.temporary("moto"), workspace.kept(parent / "mine" / "here")
    (kept.path / "data").write_bytes(b"x")
    temporary.remove()
    kept.remove()
    assert not temporary.path.exists()
    assert (kept.path / "data").read_bytes() == b"x"


def test_what_a_killed_owner_left_is_removed_and_what_is_in_use_is_not(parent):
    left, used, young = (workspace.temporary(name) for name in ("left", "used", "young"))
    for each in (left, young):
        each.lock.close()
    age(left.path)
    age(used.path)
    stranger = parent / "localstack-of-somebody-else"
    stranger.mkdir()
    workspace.temporary("next").remove()
    assert [each.path.exists() for each in (left, used, young)] == [False, True, True]
    assert stranger.exists()
    used.remove()


@pytest.mark.parametrize(("free", "in_memory"), [(64 << 20, False), (8 << 30, True)])
def test_shared_memory_is_used_where_there_is_room(tmp_path, monkeypatch, free, in_memory):
    monkeypatch.setattr(workspace, "_SHARED_MEMORY", tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))
    assert (workspace._parent() == tmp_path) is in_memory
