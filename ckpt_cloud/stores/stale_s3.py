"""S3's unfinished multipart uploads, through boto3: obstore neither lists them nor aborts those of others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import botocore.exceptions
from botocore.config import Config

from ckpt_cloud.errors import NotFound
from ckpt_cloud.format.layout import join
from ckpt_cloud.options import StoreOptions
from ckpt_cloud.stores import aws
from ckpt_cloud.stores.aws_errors import translated
from ckpt_cloud.stores.base import UnfinishedUpload
from ckpt_cloud.stores.location import Location
from ckpt_cloud.workers import in_thread

if TYPE_CHECKING:
    from botocore.session import Session


class S3Uploads:
    """Unfinished uploads under one location; a client is made when it is first needed."""

    def __init__(self, chain: Session, location: Location, options: StoreOptions, *, endpoint: str | None) -> None:
        self._chain = chain
        self._location = location
        self._options = options
        self._endpoint = endpoint

    async def list(self, prefix: str) -> Sequence[UnfinishedUpload]:
        """ListMultipartUploads, all pages."""
        return await in_thread(lambda: list(self._list(prefix)))

    async def abort(self, upload: UnfinishedUpload) -> None:
        """AbortMultipartUpload; one that is gone is not missed."""
        await in_thread(self._abort, upload)

    def _list(self, prefix: str) -> Iterator[UnfinishedUpload]:
        root = self._location.path
        below = join(root, prefix) if prefix else root
        where = {"Bucket": self._location.bucket, "Prefix": f"{below}/" if below else "", **self._payer()}
        with translated("list uploads", self._location.url):
            for page in self._client().get_paginator("list_multipart_uploads").paginate(**where):
                for upload in page.get("Uploads", []):
                    key = upload["Key"].removeprefix(f"{root}/" if root else "")
                    yield UnfinishedUpload(key, upload["UploadId"], upload["Initiated"].timestamp())

    def _abort(self, upload: UnfinishedUpload) -> None:
        key = join(self._location.path, upload.key)
        try:
            with translated("abort upload", f"{self._location.url}/{upload.key}"):
                self._client().abort_multipart_upload(
                    Bucket=self._location.bucket, Key=key, UploadId=upload.id, **self._payer()
                )
        except NotFound:
            pass

    def _payer(self) -> dict[str, str]:
        return {"RequestPayer": "requester"} if self._options.requester_pays else {}

    def _client(self) -> Any:
        options = self._options
        virtual = aws.virtual_hosted_style(self._chain, options, self._endpoint)
        config: dict[str, Any] = {
            "retries": {"total_max_attempts": 1},
            "connect_timeout": options.connect_timeout_s,
            "read_timeout": options.request_timeout_s,
            "s3": {"addressing_style": "virtual" if virtual else "path"},
        }
        if options.proxy_url:
            config["proxies"] = {"http": options.proxy_url, "https": options.proxy_url}
        if options.anonymous:
            config["signature_version"] = botocore.UNSIGNED
        return self._chain.create_client(
            "s3",
            region_name=aws.region(self._chain),
            endpoint_url=self._endpoint,
            verify=options.ca_bundle,
            config=Config(**config),
        )
