"""Objects put together from parts of other objects by the store itself: S3's UploadPartCopy, through boto3."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ckpt_cloud.format.layout import join
from ckpt_cloud.options import MIB, StoreOptions
from ckpt_cloud.stores import aws
from ckpt_cloud.stores.aws_errors import translated
from ckpt_cloud.stores.beside_s3 import BesideS3
from ckpt_cloud.stores.location import Location
from ckpt_cloud.stores.resolve import engine_for
from ckpt_cloud.workers import in_waiting_thread, to_the_end

MIN_PART_BYTES = 5 * MIB
"""Of every part but the last, copied ones too."""
MAX_COPY_BYTES = 1024 * MIB
"""S3 takes five times as much; smaller parts are copied beside each other."""
_AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class Copied:
    """Bytes `start` to `end` of the object at `key`, relative to the source's URL; of exactly `version` if given."""

    key: str
    start: int
    end: int
    version: str | None = None


Sent = Callable[[], Awaitable[bytes]]
"""Gives a part's bytes when its turn comes."""
Part = Copied | Sent


class Composer:
    """Composes objects below one S3 location, of parts of objects below `source`."""

    def __init__(self, beside: BesideS3, location: Location, source: Location) -> None:
        self._beside = beside
        self._location = location
        self._source = source

    async def compose(self, key: str, parts: Sequence[Part]) -> None:
        """Makes the object at `key` of `parts`, in order; a failure leaves nothing behind.

        Raises:
            The store's errors, as ours; nothing is tried twice.
        """
        where = {"Bucket": self._location.bucket, "Key": join(self._location.path, key)}
        client = self._beside.client()
        with translated("compose", f"{self._location.url}/{key}"):
            upload = (await _ask(client.create_multipart_upload, **where))["UploadId"]
            try:
                tags = await self._send(client, {**where, "UploadId": upload}, parts)
                listed = [{"PartNumber": number, "ETag": tag} for number, tag in enumerate(tags, 1)]
                done = {**where, "UploadId": upload, "MultipartUpload": {"Parts": listed}}
                await _ask(client.complete_multipart_upload, **done)
            except BaseException:
                with contextlib.suppress(Exception):
                    await _ask(client.abort_multipart_upload, **where, UploadId=upload)
                raise

    async def _send(self, client: Any, where: dict[str, Any], parts: Sequence[Part]) -> list[str]:
        gate = asyncio.Semaphore(_AT_ONCE)

        async def one(number: int, part: Part) -> str:
            async with gate:
                told = {**where, "PartNumber": number}
                if isinstance(part, Copied):
                    return await self._copy(client, told, part)
                answer = await _ask(client.upload_part, **told, Body=await part())
                return str(answer["ETag"])

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(number, part)) for number, part in enumerate(parts, 1)]
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _copy(self, client: Any, told: dict[str, Any], part: Copied) -> str:
        told["CopySource"] = {"Bucket": self._source.bucket, "Key": join(self._source.path, part.key)}
        told["CopySourceRange"] = f"bytes={part.start}-{part.end - 1}"
        if part.version is not None:
            told["CopySourceIfMatch"] = part.version
        answer = await _ask(client.upload_part_copy, **told)
        return str(answer["CopyPartResult"]["ETag"])


async def _ask(request: Callable[..., Any], **told: Any) -> Any:
    # To the end even when cancelled: a part that lands after the abort would stay, and be billed.
    return await to_the_end(in_waiting_thread(lambda: request(**told)))


def open_composer(location: Location, options: StoreOptions, source: Location) -> Composer | None:
    """What composes objects below `location` of those below `source`.

    None where the store cannot, `source` is in another one, or encryption is asked for.
    """
    encrypted = options.server_side_encryption is not None or options.sse_customer_key is not None
    special = encrypted or options.requester_pays or options.filesystem is not None
    elsewhere = (source.scheme, source.bucket) != (location.scheme, location.bucket)
    if location.dialect != "s3" or elsewhere or special or engine_for(location, options) != "native":
        return None
    chain = aws.session(options, location.url)
    beside = BesideS3(chain, location, options, endpoint=aws.endpoint_url(chain, options, location.url))
    return Composer(beside, location, source)
