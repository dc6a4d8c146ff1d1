"""The directory of one server: temporary and in memory where possible, or the user's own, which stays.

A temporary one holds a locked file for as long as its owner lives. An owner that was killed leaves its directory
behind, perhaps gigabytes of shared memory; the next `temporary()` finds the lock free and removes it.
"""

from __future__ import annotations

import fcntl
import shutil
import tempfile
import time
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

_PREFIX = "localstack-"
_LOCK = "owner.lock"
_SHARED_MEMORY = Path("/dev/shm")
# Containers often have 64 MB of it.
_ROOM_BYTES = 4 << 30
# A directory this young may be one that its owner has not locked yet.
_SETTLED_S = 60.0


@dataclass(frozen=True, slots=True)
class Workspace:
    """A directory, and the lock that marks it as in use; `lock` is None for a directory that is kept."""

    path: Path
    lock: FileIO | None

    @property
    def temporary(self) -> bool:
        """Whether `remove` removes it."""
        return self.lock is not None

    def remove(self) -> None:
        """Removes a temporary directory with all in it; leaves a kept one alone."""
        if self.lock is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            self.lock.close()


def kept(path: Path) -> Workspace:
    """`path`, made if need be, never removed."""
    path.mkdir(parents=True, exist_ok=True)
    return Workspace(path.resolve(), None)


def temporary(name: str) -> Workspace:
    """A new directory in shared memory if 4 GiB are free there, else where the system keeps temporary files."""
    parent = _parent()
    _remove_abandoned(parent)
    path = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{name}-", dir=parent))
    lock = FileIO(path / _LOCK, "w")
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return Workspace(path, lock)


def _parent() -> Path:
    if _SHARED_MEMORY.is_dir() and shutil.disk_usage(_SHARED_MEMORY).free >= _ROOM_BYTES:
        return _SHARED_MEMORY
    return Path(tempfile.gettempdir())


def _remove_abandoned(parent: Path) -> None:
    for lock_path in parent.glob(f"{_PREFIX}*/{_LOCK}"):
        if _abandoned(lock_path):
            shutil.rmtree(lock_path.parent, ignore_errors=True)


def _abandoned(lock_path: Path) -> bool:
    try:
        if time.time() - lock_path.stat().st_mtime < _SETTLED_S:
            return False
        with lock_path.open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False  # locked, somebody else's, or already gone
    return True
