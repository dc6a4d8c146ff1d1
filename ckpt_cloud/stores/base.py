"""What ckpt_cloud asks of an object store."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from ckpt_cloud.stores.capabilities import Capabilities

Buffer = bytes | bytearray | memoryview
MAX_PARTS = 10_000
"""Of one multipart upload on S3 and GCS."""
MAX_PART_BYTES = 5 << 30
"""Of one part on S3 and GCS."""
Source = Callable[[], AsyncIterable[Buffer]]
"""Gives an object's bytes from the beginning, each time that it is called."""


class AtHand:
    """An object's buffers, all there already: whoever can may take them without waiting, on any thread."""

    def __init__(self, buffers: Sequence[Buffer]) -> None:
        self._buffers = buffers

    def __iter__(self) -> Iterator[Buffer]:
        return iter(self._buffers)

    async def __aiter__(self) -> AsyncIterator[Buffer]:
        for buffer in self._buffers:
            # A fresh view, whose end tells that it was let go: the buffers themselves stay here.
            yield memoryview(buffer)[:]


@dataclass(frozen=True, slots=True)
class Replace:
    """Write only over exactly this version."""

    version: str


@dataclass(frozen=True, slots=True)
class _Create:
    """Write only where nothing is."""


@dataclass(frozen=True, slots=True)
class _Any:
    """Write whatever is there."""


CREATE: Final = _Create()
ANY: Final = _Any()
Condition = _Create | _Any | Replace


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object.

    Attributes:
        key: relative to the store's root.
        size: in bytes.
        version: the store's name for this version (an ETag or a generation), for `Replace` and pinned reads.
        modified_unix_s: seconds since 1970 by the store's clock.
        crc32c: of all its bytes, as the store computed it itself; None where it does not tell.
    """

    key: str
    size: int
    version: str | None
    modified_unix_s: float
    crc32c: int | None = None


@dataclass(frozen=True, slots=True)
class UnfinishedUpload:
    """A multipart upload that was begun and neither completed nor aborted: in no listing, and billed.

    Attributes:
        key: of the object that it would have become, relative to the store's root.
        id: the store's name for the upload.
        started_unix_s: seconds since 1970 by the store's clock.
    """

    key: str
    id: str
    started_unix_s: float


class ObjectStore(Protocol):
    """Objects under one URL; keys are relative to it.

    Every method may raise `StoreUnavailable`, `Throttled`, `PermissionDenied`, `BucketNotFound`, `WrongRegion` or
    `RequestRefused`, each naming the object and the operation. Reads and unconditional writes are retried inside
    for as long as `RetryOptions` say; conditional writes never are, so that their answer is the store's own.
    """

    url: str
    """Of the root, without secrets."""
    max_parts: int
    """Most parts of one multipart upload."""
    max_part_bytes: int
    """Largest part of one."""

    async def put(self, key: str, data: Buffer, condition: Condition = ANY) -> str | None:
        """Stores `data` in one request and returns the version where the store names it.

        Raises:
            AlreadyExists: `CREATE`, and an object is there.
            PreconditionFailed: `Replace`, and another version or nothing is there.
            Unsupported: the store cannot keep the condition.
        """
        ...

    async def put_multipart(self, key: str, source: Source, *, part_size: int, concurrency: int) -> str | None:
        """Stores the buffers of `source`, whatever their sizes, as parts of `part_size`, `concurrency` at a time.

        Buffers are let go as soon as their part is stored, and none is held on to while the next is waited for. A
        failure aborts the upload: nothing becomes visible. It may begin again, with another call of `source`.
        """
        ...

    async def get(self, key: str, *, limit: int) -> tuple[bytes, ObjectInfo]:
        """The whole object, of at most `limit` bytes.

        Raises:
            NotFound: no such object.
            Damaged: it is larger than `limit`, so it is not what anybody wrote there.
        """
        ...

    async def head(self, key: str) -> ObjectInfo:
        """Size and version of the object.

        Raises:
            NotFound: no such object.
        """
        ...

    async def get_range(self, key: str, start: int, end: int, version: str | None = None) -> memoryview:
        """The object's bytes from `start` to `end` (exclusive), of exactly `version` if given.

        An empty range gives nothing, and the store is not asked.

        Raises:
            NotFound: no such object.
            PreconditionFailed: the object is another version.
            RangeNotSatisfiable: the object ends before `end`.
            StoreUnavailable: fewer or more bytes came than asked for.
        """
        ...

    async def get_range_into(
        self, key: str, start: int, end: int, into: Sequence[memoryview], version: str | None = None
    ) -> None:
        """Fills `into`, one buffer after another, with what `get_range` gives; raises what it raises.

        Args:
            into: writable, together `end - start` bytes; what they hold after a failure is nobody's promise, but
                nothing is written to them any more.
        """
        ...

    def list(self, prefix: str = "") -> AsyncIterator[ObjectInfo]:
        """All objects whose keys begin with the whole path segments of `prefix`, in any order."""
        ...

    async def list_children(self, prefix: str = "") -> Sequence[str]:
        """Names right under `prefix` that have objects below them, sorted."""
        ...

    async def capabilities(self) -> Capabilities:
        """Which conditions the store keeps; asked of it once per bucket in this process."""
        ...

    async def delete(self, keys: Sequence[str]) -> None:
        """Deletes objects; those that are not there are not missed."""
        ...

    async def list_uploads(self, prefix: str = "") -> Sequence[UnfinishedUpload]:
        """Unfinished uploads of keys that begin with the whole path segments of `prefix`.

        Raises:
            Unsupported: the store does not tell; its documentation says what becomes of them.
        """
        ...

    async def abort_upload(self, upload: UnfinishedUpload) -> None:
        """Discards the parts of an unfinished upload; one that is gone is not missed.

        Raises:
            Unsupported: the store gives no way to.
        """
        ...


def fill(into: Sequence[memoryview], data: memoryview) -> None:
    """Copies `data` into the buffers `into`, one after another; lets other threads run meanwhile."""
    import numpy as np

    at = 0
    for view in into:
        np.copyto(np.frombuffer(view, np.uint8), np.frombuffer(data[at : at + len(view)], np.uint8))
        at += len(view)
