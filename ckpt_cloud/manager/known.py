"""The committed steps under a root, as one rank knows them.

The registers are the truth. A small object beside the checkpoints, `STEPS`, remembers what they said, so that ten
thousand steps are listed with ten requests and not with ten thousand. It is a hint: lost, stale or damaged, it costs
requests, and nothing is restored or deleted on its word.
"""

from __future__ import annotations

import asyncio
import logging
import re
import threading
from collections.abc import Iterable, Iterator

import msgspec

from ckpt_cloud import bridge
from ckpt_cloud.commit import NO_KEYS, open_manifest, read_register
from ckpt_cloud.encryption import Keyring
from ckpt_cloud.errors import (
    CheckpointDeleted,
    CheckpointNotFound,
    ChooseAnother,
    CkptCloudError,
    CorruptCommit,
    Damaged,
    Unsupported,
)
from ckpt_cloud.format.layout import id_unix_ms, is_id
from ckpt_cloud.format.register import Register
from ckpt_cloud.manager.policies import Mode, SavedStep, ranked
from ckpt_cloud.options import StoreOptions
from ckpt_cloud.stores import Location, ObjectStore, open_store

log = logging.getLogger(__name__)

HINT_KEY = "STEPS"
_HINT_LIMIT = 64 << 20
_LOOKS_AT_ONCE = 32


class _Hinted(msgspec.Struct, frozen=True, array_like=True):
    """One step of the hint; an empty attempt is a step that is no longer there."""

    attempt: str
    metrics: dict[str, float] = {}


class _Hint(msgspec.Struct, frozen=True):
    steps: dict[str, _Hinted]
    format: str = "ckpt-cloud-steps"
    version: int = 1


class KnownSteps:
    """What is under a root, asked as seldom as possible. May be used from several threads.

    Args:
        root: of the run.
        prefix: of the names of its checkpoints, before the step.
        options: of its store.
        keys: of encrypted checkpoints.
    """

    def __init__(self, root: Location, prefix: str, options: StoreOptions, keys: Keyring = NO_KEYS) -> None:
        self.root = root
        self._prefix = prefix
        self._options = options
        self._keys = keys
        self._named = re.compile(rf"{re.escape(prefix)}(0|[1-9][0-9]*)")
        # All change under the lock: committed steps and those seen to be gone, whether the hint was read, and whether
        # it is behind.
        self._lock = threading.RLock()
        self._committed: dict[int, SavedStep] = {}
        self._gone: set[int] = set()
        self._hint_read = False
        self._stale = False

    def location(self, step: int) -> Location:
        """Where a step is, or would be."""
        return self.root.child(f"{self._prefix}{step}")

    def names(self) -> list[int]:
        """Steps that have anything under them, ascending: one listing."""
        names = bridge.run(self._store().list_children())
        return sorted(int(found[1]) for name in names if (found := self._named.fullmatch(name)))

    def refresh(self, *, exact: bool = False) -> list[SavedStep]:
        """The committed steps, ascending: one listing, and one small read of each step that is not known yet.

        Args:
            exact: read the register of every step, whatever is known.
        """
        present = self.names()
        with self._lock:
            if not self._hint_read and not exact:
                self._read_hint()
            known = set() if exact else self._committed.keys() | self._gone
        looked = self.look(step for step in present if step not in known)
        with self._lock:
            for step in set(self._committed) - set(present):
                del self._committed[step]
            for step, register in looked.items():
                self._note(step, register)
            return [self._committed[step] for step in sorted(self._committed)]

    @property
    def saved(self) -> list[SavedStep]:
        """The committed steps that are known, ascending; nobody is asked."""
        with self._lock:
            return [self._committed[step] for step in sorted(self._committed)]

    def look(self, steps: Iterable[int]) -> dict[int, Register | None]:
        """Registers of these steps; None where there is none, or none that can be read. A few at once."""
        return bridge.run(self._look(list(steps)))

    def note(self, step: int) -> SavedStep | None:
        """Reads the register of one step and remembers what it says."""
        return self.note_all([step])[0]

    def note_all(self, steps: Iterable[int]) -> list[SavedStep | None]:
        """The same of several steps, a few at once."""
        looked = self.look(steps)
        with self._lock:
            for step, register in looked.items():
                self._note(step, register)
            return [self._committed.get(step) for step in looked]

    def best(self, metric: str, mode: Mode) -> int | None:
        """The best step by a metric, whose register was read again to be sure."""
        for each in ranked(self.refresh(), metric, mode):
            if self.note(each.step) == each:
                return each.step
        again = ranked(self.saved, metric, mode)
        return again[0].step if again else None

    def metrics(self, step: int) -> dict[str, float]:
        """What was saved with a step.

        Raises:
            CheckpointNotFound: it is not committed.
        """
        found = self.note(step)
        if found is None:
            raise CheckpointNotFound(f"step {step} is not committed", self.location(step).url, "see all_steps()")
        return dict(found.metrics)

    def forget(self, step: int) -> None:
        """The step was deleted."""
        with self._lock:
            self._committed.pop(step, None)
            self._gone.add(step)
            self._stale = True

    def newest_first(self, below: int | None = None) -> Iterator[tuple[int, CkptCloudError | None]]:
        """Steps from the highest down, each with why it cannot be loaded, or None where it can as far as can be seen.

        Reads registers and manifests as it goes, whatever is known, and never the hint. Deleted steps are left out.

        Args:
            below: begin under this step.
        """
        for step in reversed(self.names()):
            if below is not None and step >= below:
                continue
            problem = self.problem(step)
            if not isinstance(problem, CheckpointDeleted):
                yield step, problem

    def problem(self, step: int) -> CkptCloudError | None:
        """Why a step cannot be loaded: its register or manifest does not open.

        Raises:
            EncryptionKeyMissing, WrongEncryptionKey, StoreUnavailable, ...: nothing can be said of it.
        """
        store = open_store(self.location(step), self._options, first_contact=True)
        try:
            bridge.run(open_manifest(store, keys=self._keys))
        except (Damaged, ChooseAnother, Unsupported) as error:
            return error
        return None

    def write_hint(self) -> None:
        """Stores what is known, if that has changed; a failure is passed over, since it is only a hint."""
        with self._lock:
            if not self._stale:
                return
            if not self._hint_read:
                self._read_hint()
            steps = {str(step): _Hinted("", {}) for step in sorted(self._gone)}
            steps |= {str(s): _Hinted(each.attempt, dict(each.metrics)) for s, each in sorted(self._committed.items())}
            self._stale = False
        try:
            bridge.run(self._store().put(HINT_KEY, msgspec.json.encode(_Hint(steps))))
        except CkptCloudError as error:
            log.info("the list of steps under %s was not updated: %s", self.root.url, error)
            with self._lock:
                self._stale = True

    def _read_hint(self) -> None:
        self._hint_read = True
        try:
            data, _ = bridge.run(self._store().get(HINT_KEY, limit=_HINT_LIMIT))
            hint = msgspec.json.decode(data, type=_Hint)
        except (CkptCloudError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            log.debug("no list of steps under %s: %s", self.root.url, error)
            return
        if (hint.format, hint.version) != ("ckpt-cloud-steps", 1):
            return
        for name, hinted in hint.steps.items():
            if not name.isdecimal() or int(name) in self._committed.keys() | self._gone:
                continue
            if not hinted.attempt:
                self._gone.add(int(name))
            elif is_id(hinted.attempt):
                self._committed[int(name)] = _saved(int(name), hinted.attempt, hinted.metrics)

    def _note(self, step: int, register: Register | None) -> None:
        before = self._committed.pop(step, None), step in self._gone
        self._gone.discard(step)
        if register is not None and register.state == "committed":
            self._committed[step] = _saved(step, register.attempt, register.metrics or {})
        elif register is not None:
            self._gone.add(step)
        self._stale = self._stale or before != (self._committed.get(step), step in self._gone)

    async def _look(self, steps: list[int]) -> dict[int, Register | None]:
        gate = asyncio.Semaphore(_LOOKS_AT_ONCE)
        store = self._store()

        async def one(step: int) -> Register | None:
            async with gate:
                try:
                    return (await read_register(store, under=f"{self._prefix}{step}")).register
                except (CorruptCommit, Unsupported) as error:
                    log.warning("step %d does not count: %s", step, error)
                    return None

        return dict(zip(steps, await asyncio.gather(*map(one, steps)), strict=True))

    def _store(self) -> ObjectStore:
        return open_store(self.root, self._options, first_contact=True)


def _saved(step: int, attempt: str, metrics: dict[str, float]) -> SavedStep:
    return SavedStep(step, id_unix_ms(attempt) / 1000, metrics, attempt)
