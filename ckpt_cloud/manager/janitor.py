"""Deletes in the background what a policy does not keep; what cannot be deleted now is tried again later."""

from __future__ import annotations

import logging
import threading
import time

from ckpt_cloud.collector import delete
from ckpt_cloud.errors import CheckpointNotFound, CkptCloudError
from ckpt_cloud.manager.known import KnownSteps
from ckpt_cloud.manager.policies import Policy, SavedStep, doomed
from ckpt_cloud.options import StoreOptions

log = logging.getLogger(__name__)

_SEEN_AGAIN = 32
"""So many of the newest that are kept are looked at again before anything is deleted because of them."""


class Janitor:
    """One thread that tidies up after each save, and ends when there is nothing to do.

    Before anything is deleted, the newest checkpoint that is kept is opened once more: while there is no good one,
    nothing goes.
    """

    def __init__(self, known: KnownSteps, policy: Policy | None, store: StoreOptions) -> None:
        self._known = known
        self._policy = policy
        self._store = store
        # All change under the lock, but for the last two, which are the thread's: steps that were just saved, those in
        # use, what failed, and the thread if one runs; whether the root was listed, and attempts seen to be good.
        self._lock = threading.Condition()
        self._fresh: list[int] = []
        self._pinned: set[int] = set()
        self._failed: dict[int, str] = {}
        self._thread: threading.Thread | None = None
        self._wanted = False
        self._closed = False
        self._listed = False
        self._verified: set[str] = set()

    @property
    def failed(self) -> dict[int, str]:
        """Steps whose deletion failed, with the reason; each is tried again after the next save."""
        with self._lock:
            return dict(self._failed)

    def pin(self, step: int, *, on: bool) -> None:
        """Keeps a step, or lets it go, while it is being loaded."""
        with self._lock:
            (self._pinned.add if on else self._pinned.discard)(step)

    def nudge(self, saved: int | None = None) -> None:
        """Something may be to do, such as after `saved` was committed. Returns at once."""
        with self._lock:
            if self._closed:
                return
            self._fresh += [] if saved is None else [saved]
            self._wanted = True
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="ckpt_cloud-janitor", daemon=True)
                self._thread.start()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits until there is nothing to do; whether that was within `timeout_s`."""
        with self._lock:
            return self._lock.wait_for(lambda: self._thread is None, timeout_s)

    def close(self, timeout_s: float | None) -> None:
        """Takes no more work, and waits for what there is."""
        with self._lock:
            self._closed = True
        if not self.wait(timeout_s):
            log.warning("old checkpoints under %s are still being deleted; the next run goes on", self._known.root.url)

    def _run(self) -> None:
        while self._next():
            try:
                self._tidy()
            except CkptCloudError as error:
                log.warning("old checkpoints under %s were left for later: %s", self._known.root.url, error)
            except Exception:
                log.exception("old checkpoints under %s were left for later", self._known.root.url)

    def _next(self) -> bool:
        with self._lock:
            if self._wanted:
                self._wanted = False
                return True
            self._thread = None
            self._lock.notify_all()
            return False

    def _tidy(self) -> None:
        with self._lock:
            fresh, self._fresh = self._fresh, []
        for step in fresh:
            noted = self._known.note(step)
            self._verified |= {noted.attempt} if noted else set()
        if self._policy is not None and fresh:
            for each in self._doomed(self._policy):
                self._delete(each)
        self._known.write_hint()

    def _doomed(self, policy: Policy) -> list[SavedStep]:
        if not self._listed:
            self._known.refresh()
            self._listed = True
        while True:
            saved = self._known.saved
            while saved and not self._is_good(saved[-1]):
                saved.pop()
            with self._lock:
                pinned = set(self._pinned)
            newest = saved[-1].step if saved else None
            found = doomed(policy, saved, newest_good=newest, pinned=pinned, now_unix_s=time.time())
            gone = {each.step for each in found}
            if not found or not self._differs([each for each in saved if each.step not in gone]):
                return found

    def _differs(self, kept: list[SavedStep]) -> bool:
        """Whether one of those to keep is not what is known of it: the hint is stale, or others changed it since."""
        hinted = [each for each in kept[:-_SEEN_AGAIN] if each.attempt not in self._verified]
        doubtful = [*hinted, *kept[-_SEEN_AGAIN:]]
        now = self._known.note_all(each.step for each in doubtful)
        self._verified |= {each.attempt for each in now if each is not None}
        return now != doubtful

    def _is_good(self, each: SavedStep) -> bool:
        now = self._known.note(each.step)
        if now is None:
            return False
        problem = None if now.attempt in self._verified else self._known.problem(each.step)
        if problem is not None:
            log.warning("step %d does not count as a checkpoint: %s", each.step, problem)
            return False
        self._verified.add(now.attempt)
        return True

    def _delete(self, each: SavedStep) -> None:
        url = self._known.location(each.step).url
        now = self._known.note(each.step)
        if now is not None and now != each:
            return
        try:
            delete(url, store=self._store)
        except CheckpointNotFound:
            self._known.forget(each.step)
        except CkptCloudError as error:
            log.warning("step %d could not be deleted and will be tried again: %s", each.step, error)
            with self._lock:
                self._failed[each.step] = str(error)
        else:
            log.info("deleted %s", url)
            self._known.forget(each.step)
            with self._lock:
                self._failed.pop(each.step, None)
