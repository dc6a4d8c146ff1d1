"""A store that fails as it is told: which operation, on which key, how often, and from when on.

FaultyStore.put ... ─► Faults: records the operation, picks the first rule that is due ─► the store that it wraps

Faults lie above the store's own retries: each stands for what is left when those have given up, and needs no waiting.
"""

# ruff: noqa: D102 - the methods of a store are documented once, on the protocol

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import NamedTuple

from ckpt_cloud.errors import InvalidOption, StoreUnavailable
from ckpt_cloud.format.layout import join
from ckpt_cloud.stores.base import ANY, Buffer, Condition, ObjectInfo, ObjectStore, Source, UnfinishedUpload, fill
from ckpt_cloud.stores.capabilities import Capabilities
from ckpt_cloud.stores.intercept import intercepted
from ckpt_cloud.testing.rules import Call, Corrupt, Error, Fail, Hang, Rule, Shorten

OPERATIONS = (
    "put",
    "put_multipart",
    "get",
    "head",
    "get_range",
    "list",
    "list_children",
    "capabilities",
    "delete",
    "list_uploads",
    "abort_upload",
)
"""Methods of the `ObjectStore` protocol; a read into buffers counts as `get_range`."""


class Crashed(StoreUnavailable):
    """Nothing gets through any more, from `Faults.crash_at` on.

    The code under test goes on after it, unlike after a real crash, and must take it for what such a process would
    last see: a store that is gone. That is why it is a `StoreUnavailable`. Cleaning up fails likewise, so that what is
    left in the store is what a crash leaves.
    """

    kind = "crashed"


class Operation(NamedTuple):
    """One operation that a store was asked for.

    Attributes:
        operation: name of the method.
        key: relative to the checkpoint; the prefix of a listing; the first of the keys of a delete; or empty.
        outcome: `done`, the name of the error that was raised, or `under way`.
    """

    operation: str
    key: str
    outcome: str


@dataclass(slots=True)
class _Record:
    call: Call
    outcome: str = "under way"

    def shown(self) -> Operation:
        return Operation(self.call.operation, self.call.keys[0], self.outcome)


class Faults:
    """Rules about what goes wrong, shared by all stores that they are given to, and a record of what was asked.

    An operation obeys the first rule that applies to it and is due; a crash goes before all rules. Operations and keys
    are `fnmatch` patterns, as in `put*` and `data/*`, where `*` matches slashes too. For all rules:

    - `times`: how many operations obey the rule before it is used up; None for all.
    - `after`: so many operations that the rule applies to go through first.

    All methods may be called from any thread, while a save or load is under way too. They raise `InvalidOption` for an
    operation that no store has, and for numbers out of range.
    """

    def __init__(self) -> None:
        # All three change under the lock of the condition, which tells of every change.
        self._changed = threading.Condition()
        self._rules: list[Rule] = []
        self._records: list[_Record] = []

    def __repr__(self) -> str:
        return f"<Faults {len(self._rules)} rules, {len(self._records)} operations>"

    @property
    def operations(self) -> list[Operation]:
        """What was asked of all stores since `clear`, in the order in which it began."""
        with self._changed:
            return [record.shown() for record in self._records]

    def fail(
        self,
        operation: str = "*",
        key: str = "*",
        error: Error = StoreUnavailable,
        times: int | None = 1,
        after: int = 0,
        *,
        applied: bool = False,
    ) -> None:
        """Operations raise `error`.

        Args:
            error: a class, an instance, or a function of operation and key that makes one.
            applied: the operation takes effect first, and only its answer is lost.
        """
        if isinstance(error, type) and not issubclass(error, Exception):
            raise InvalidOption(f"error is {error.__name__}, which no store raises; give an Exception")
        self._add(Fail(operation, key, times, after, applied, error=error))

    def crash_at(self, n: int) -> None:
        """The `n`th operation from now (1 is the next), and all after it, raise `Crashed` and do nothing.

        What began before is carried out, as a request under way would be. `clear` brings the store back.
        """
        if n < 1:
            raise InvalidOption(f"n is {n}; 1 is the next operation")
        self._add(Fail("*", "*", None, n - 1, error=Crashed), first=True)

    def hang(self, operation: str = "*", key: str = "*", times: int | None = 1, after: int = 0) -> None:
        """Operations are not answered, and not carried out, until `release`."""
        self._add(Hang(operation, key, times, after))

    def release(self) -> None:
        """Operations that hang are carried out now, and no more hang."""
        with self._changed:
            self._release()

    def corrupt(self, key: str, *, at: int | None = None, times: int | None = None, after: int = 0) -> None:
        """Reads (`get` and `get_range`) return their bytes with one bit flipped.

        Reads are checked and, if they are wrong, done once more: `times=1` is damage on the way, None in the store.

        Args:
            at: of the byte in the object; reads without that byte are untouched. None is the middle of every read.
        """
        if at is not None and at < 0:
            raise InvalidOption(f"at is {at}; the first byte is 0")
        self._add(Corrupt("get*", key, times, after, at))

    def shorten(self, key: str, *, size: int = 0, times: int | None = None, after: int = 0) -> None:
        """Reads (`get` and `get_range`) find the object cut to `size` bytes; those that end before are untouched."""
        if size < 0:
            raise InvalidOption(f"size is {size} bytes")
        self._add(Shorten("get*", key, times, after, size))

    def clear(self) -> None:
        """Forgets all rules and operations, and releases what hangs: the store is as good as new."""
        with self._changed:
            self._release()
            self._rules.clear()
            self._records.clear()

    def wait_for(self, operation: str = "*", key: str = "*", *, timeout_s: float = 30.0) -> None:
        """Waits until such an operation has begun since `clear`; to act while it is under way.

        Raises:
            TimeoutError: it has not within `timeout_s` seconds.
        """
        seen = Rule(_known(operation), key)
        with self._changed:
            if not self._changed.wait_for(
                lambda: any(seen.matches(record.call) for record in self._records), timeout_s
            ):
                raise TimeoutError(f"no {operation} of {key} within {timeout_s:g} s")

    def everywhere(self) -> AbstractContextManager[None]:
        """A context manager: all stores that this process opens meanwhile, below any URL, obey these rules."""
        return intercepted(self._wrap)

    @asynccontextmanager
    async def watched(self, call: Call) -> AsyncIterator[Rule]:
        """Around one operation of a store: gives the rule that it obeys, and raises what that says."""
        record, rule = self._begin(call)
        try:
            await rule.before(call)
            yield rule
            rule.afterwards(call)
        except BaseException as error:
            record.outcome = type(error).__name__
            raise
        record.outcome = "done"

    def _begin(self, call: Call) -> tuple[_Record, Rule]:
        record = _Record(call)
        with self._changed:
            due = [rule for rule in self._rules if rule.due(call)]
            rule = due[0] if due else Rule("*", "*")
            rule.used += 1
            self._records.append(record)
            self._changed.notify_all()
        return record, rule

    def _add(self, rule: Rule, *, first: bool = False) -> None:
        _known(rule.operation)
        if rule.after < 0 or (rule.times is not None and rule.times < 1):
            raise InvalidOption(f"times is {rule.times} and after {rule.after}; they must be at least 1 and 0")
        with self._changed:
            self._rules.insert(0 if first else len(self._rules), rule)

    def _release(self) -> None:
        for rule in self._rules:
            rule.release()
        self._rules = [rule for rule in self._rules if not isinstance(rule, Hang)]

    def _wrap(self, store: ObjectStore) -> ObjectStore:
        return FaultyStore(store, self)


class FaultyStore:
    """An `ObjectStore` that asks `faults` before it hands an operation on to `store`."""

    def __init__(self, store: ObjectStore, faults: Faults) -> None:
        self.url = store.url
        self.max_parts = store.max_parts
        self.max_part_bytes = store.max_part_bytes
        self._store = store
        self._faults = faults

    def __repr__(self) -> str:
        return f"<FaultyStore {self._store!r} {self._faults!r}>"

    async def put(self, key: str, data: Buffer, condition: Condition = ANY) -> str | None:
        async with self._watched("put", key):
            return await self._store.put(key, data, condition)

    async def put_multipart(self, key: str, source: Source, *, part_size: int, concurrency: int) -> str | None:
        async with self._watched("put_multipart", key):
            return await self._store.put_multipart(key, source, part_size=part_size, concurrency=concurrency)

    async def get(self, key: str, *, limit: int) -> tuple[bytes, ObjectInfo]:
        async with self._watched("get", key) as rule:
            data, info = await self._store.get(key, limit=limit)
            seen = rule.read(memoryview(data), 0)
            return bytes(seen), replace(info, size=len(seen))

    async def head(self, key: str) -> ObjectInfo:
        async with self._watched("head", key):
            return await self._store.head(key)

    async def get_range(self, key: str, start: int, end: int, version: str | None = None) -> memoryview:
        async with self._watched("get_range", key, start=start, end=end) as rule:
            return rule.read(await self._store.get_range(key, start, end, version), start)

    async def get_range_into(
        self, key: str, start: int, end: int, into: Sequence[memoryview], version: str | None = None
    ) -> None:
        fill(into, await self.get_range(key, start, end, version))

    async def list(self, prefix: str = "") -> AsyncIterator[ObjectInfo]:
        async with self._watched("list", prefix):
            async for info in self._store.list(prefix):
                yield info

    async def list_children(self, prefix: str = "") -> Sequence[str]:
        async with self._watched("list_children", prefix):
            return await self._store.list_children(prefix)

    async def capabilities(self) -> Capabilities:
        async with self._watched("capabilities", ""):
            return await self._store.capabilities()

    async def delete(self, keys: Sequence[str]) -> None:
        async with self._watched("delete", *keys):
            await self._store.delete(keys)

    async def list_uploads(self, prefix: str = "") -> Sequence[UnfinishedUpload]:
        async with self._watched("list_uploads", prefix):
            return await self._store.list_uploads(prefix)

    async def abort_upload(self, upload: UnfinishedUpload) -> None:
        async with self._watched("abort_upload", upload.key):
            await self._store.abort_upload(upload)

    def _watched(
        self, operation: str, *keys: str, start: int = 0, end: int | None = None
    ) -> AbstractAsyncContextManager[Rule]:
        names = keys or ("",)
        return self._faults.watched(Call(operation, names, join(self.url, names[0]).rstrip("/"), start, end))


def _known(operation: str) -> str:
    """The pattern, if a store has an operation that it fits."""
    if not any(fnmatchcase(name, operation) for name in OPERATIONS):
        raise InvalidOption(f"no operation is called {operation!r}; stores have {', '.join(OPERATIONS)}")
    return operation
