"""Unfinished multipart uploads under a root URL: in no listing of objects, and billed until somebody aborts them."""

from __future__ import annotations

import asyncio
import os
import time
from datetime import timedelta

from ckpt_cloud import bridge
from ckpt_cloud.errors import InvalidOption
from ckpt_cloud.options import StoreOptions
from ckpt_cloud.stores import ObjectStore, UnfinishedUpload, open_store, parse_url

GRACE = timedelta(hours=24)
"""Younger uploads may belong to a save that is still running."""
_ABORTS_AT_ONCE = 16


def list_uploads(
    root: str | os.PathLike[str], *, older_than: timedelta = timedelta(0), store: StoreOptions | None = None
) -> list[UnfinishedUpload]:
    """Unfinished uploads below `root` that began longer than `older_than` ago, oldest first.

    On S3 these are multipart uploads, on Google Cloud Storage the components of objects that were never composed, on
    Azure blobs none of whose blocks were committed, on local disks temporary files.

    Raises:
        Unsupported: the store does not tell (Google's by the native engine), or the library that asks is missing.
    """
    return bridge.run(_list(_opened(root, store), older_than))


def abort_uploads(
    root: str | os.PathLike[str], *, older_than: timedelta = GRACE, store: StoreOptions | None = None
) -> list[UnfinishedUpload]:
    """Aborts the unfinished uploads below `root` that began longer than `older_than` ago, and returns them.

    Nothing that a checkpoint needs is touched: an upload is no object yet. One of a save that is still running makes
    that save fail; the default of 24 hours is for these.

    Raises:
        Unsupported: as `list_uploads`.
    """
    return bridge.run(_abort(_opened(root, store), older_than))


def _opened(root: str | os.PathLike[str], options: StoreOptions | None) -> ObjectStore:
    return open_store(parse_url(root), options or StoreOptions(), first_contact=True)


async def _list(store: ObjectStore, older_than: timedelta) -> list[UnfinishedUpload]:
    if older_than < timedelta(0):
        raise InvalidOption(f"older_than is {older_than}; it must not be negative")
    latest_start = time.time() - older_than.total_seconds()
    found = [upload for upload in await store.list_uploads() if upload.started_unix_s <= latest_start]
    return sorted(found, key=lambda upload: (upload.started_unix_s, upload.key))


async def _abort(store: ObjectStore, older_than: timedelta) -> list[UnfinishedUpload]:
    stale = await _list(store, older_than)
    gate = asyncio.Semaphore(_ABORTS_AT_ONCE)

    async def one(upload: UnfinishedUpload) -> None:
        async with gate:
            await store.abort_upload(upload)

    await asyncio.gather(*(one(upload) for upload in stale))
    return stale
