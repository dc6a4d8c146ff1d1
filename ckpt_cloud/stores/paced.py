"""What every remote store is wrapped in: retries with full jitter and a deadline, and a pace that throttling sets.

Engines below send each request once. A conditional write goes through untouched, so that its answer is the store's
own: the commit's loop decides what comes next.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TypeVar

import tenacity

from ckpt_cloud.errors import StoreUnavailable, Throttled
from ckpt_cloud.events import count_retry
from ckpt_cloud.options import RetryOptions, StoreOptions
from ckpt_cloud.stores.base import ANY, AtHand, Buffer, Condition, ObjectInfo, ObjectStore, Source, UnfinishedUpload
from ckpt_cloud.stores.capabilities import Capabilities
from ckpt_cloud.stores.pace import Pace
from ckpt_cloud.stores.parts_in_flight import PartsInFlight

T = TypeVar("T")

_FIRST_PAUSE_S = 0.1


class PacedStore:
    """Another store, whose requests are sent again for as long as `RetryOptions` say, and no faster than it takes them.

    Args:
        store: sends each request once.
        options: of which `retry` counts.
        first_contact: give up within `RetryOptions.first_contact_s`.
    """

    def __init__(self, store: ObjectStore, options: StoreOptions, *, first_contact: bool = False) -> None:
        self.url = store.url
        self.max_parts = store.max_parts
        self.max_part_bytes = store.max_part_bytes
        self.pace = Pace()
        self._store = store
        retry = options.retry
        self._retry = retry
        self._deadline_s = min(retry.first_contact_s, retry.deadline_s) if first_contact else retry.deadline_s

    def __repr__(self) -> str:
        return f"<PacedStore {self._store!r} {self.pace!r}>"

    async def put(self, key: str, data: Buffer, condition: Condition = ANY) -> str | None:
        if condition is not ANY:
            return await self._store.put(key, data, condition)
        return await self._again(lambda: self._store.put(key, data))

    async def put_multipart(self, key: str, source: Source, *, part_size: int, concurrency: int) -> str | None:
        async def once() -> str | None:
            buffers = source()
            if isinstance(buffers, AtHand) and self.pace.limit is None:
                # Until the store throttles nobody has to watch single parts.
                async with self.pace.turn(concurrency):
                    return await self._store.put_multipart(
                        key, lambda: buffers, part_size=part_size, concurrency=concurrency
                    )
            with PartsInFlight(lambda: buffers, part_size, self.pace, key) as parts:
                return await self._store.put_multipart(key, parts.stream, part_size=part_size, concurrency=concurrency)

        return await self._retried(once)

    async def get(self, key: str, *, limit: int) -> tuple[bytes, ObjectInfo]:
        return await self._again(lambda: self._store.get(key, limit=limit))

    async def head(self, key: str) -> ObjectInfo:
        return await self._again(lambda: self._store.head(key))

    async def get_range(self, key: str, start: int, end: int, version: str | None = None) -> memoryview:
        return await self._again(lambda: self._store.get_range(key, start, end, version))

    async def get_range_into(
        self, key: str, start: int, end: int, into: Sequence[memoryview], version: str | None = None
    ) -> None:
        await self._again(lambda: self._store.get_range_into(key, start, end, into, version))

    async def list(self, prefix: str = "") -> AsyncIterator[ObjectInfo]:
        async def all_of_it() -> Sequence[ObjectInfo]:
            return [info async for info in self._store.list(prefix)]

        # Whole, since half a listing cannot be begun again.
        for info in await self._again(all_of_it):
            yield info

    async def list_children(self, prefix: str = "") -> Sequence[str]:
        return await self._again(lambda: self._store.list_children(prefix))

    async def capabilities(self) -> Capabilities:
        return await self._again(self._store.capabilities)

    async def delete(self, keys: Sequence[str]) -> None:
        await self._again(lambda: self._store.delete(keys))

    async def list_uploads(self, prefix: str = "") -> Sequence[UnfinishedUpload]:
        return await self._again(lambda: self._store.list_uploads(prefix))

    async def abort_upload(self, upload: UnfinishedUpload) -> None:
        await self._again(lambda: self._store.abort_upload(upload))

    async def _again(self, request: Callable[[], Awaitable[T]]) -> T:
        """One request at the store's pace, and again while it may be."""

        async def once() -> T:
            async with self.pace.turn():
                return await request()

        return await self._retried(once)

    async def _retried(self, once: Callable[[], Awaitable[T]]) -> T:
        return await _retrying(self._retry, self._deadline_s)(once)


def _retrying(retry: RetryOptions, deadline_s: float) -> tenacity.AsyncRetrying:
    """Exponential backoff with full jitter (AWS Architecture Blog, "Exponential Backoff And Jitter", 2015)."""
    return tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception_type((StoreUnavailable, Throttled)),
        stop=tenacity.stop_after_attempt(retry.max_retries + 1) | FailingFor(deadline_s),
        wait=tenacity.wait_random_exponential(_FIRST_PAUSE_S, retry.max_backoff_s),
        before_sleep=lambda _: count_retry(),
        reraise=True,
    )


class FailingFor(tenacity.stop.stop_base):
    """Stops before a pause that would end later than `deadline_s` after the first failure.

    Not after the first attempt began: a large object may be on its way for longer than the deadline.
    """

    def __init__(self, deadline_s: float) -> None:
        self._deadline_s = deadline_s
        self._first_failure: float | None = None

    def __call__(self, retry_state: tenacity.RetryCallState) -> bool:
        assert retry_state.outcome_timestamp is not None, "tenacity asks after an attempt"
        if self._first_failure is None:
            self._first_failure = retry_state.outcome_timestamp
        failing_for = retry_state.outcome_timestamp - self._first_failure
        return failing_for + retry_state.upcoming_sleep >= self._deadline_s
