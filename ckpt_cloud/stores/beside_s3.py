"""What obstore cannot ask S3, through boto3: unfinished uploads, and where a bucket is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import botocore.exceptions
from botocore.config import Config

from ckpt_cloud.format.layout import join
from ckpt_cloud.options import StoreOptions
from ckpt_cloud.stores import aws, aws_errors
from ckpt_cloud.stores.aws_errors import translated
from ckpt_cloud.stores.base import UnfinishedUpload
from ckpt_cloud.stores.foreign_errors import web_page
from ckpt_cloud.stores.location import Location
from ckpt_cloud.workers import in_thread

if TYPE_CHECKING:
    from botocore.session import Session


class BesideS3:
    """Requests about one location that are seldom needed; a client is made when one is."""

    def __init__(self, chain: Session, location: Location, options: StoreOptions, *, endpoint: str | None) -> None:
        self._chain = chain
        self._location = location
        self._options = options
        self._endpoint = endpoint

    async def list_uploads(self, prefix: str) -> Sequence[UnfinishedUpload]:
        """ListMultipartUploads, all pages."""
        return await in_thread(lambda: list(self._list(prefix)))

    async def abort_upload(self, upload: UnfinishedUpload) -> None:
        """AbortMultipartUpload; one that is gone is not missed."""
        await in_thread(self._abort, upload)

    async def delete_one_by_one(self, keys: Sequence[str]) -> None:
        """DeleteObject of each; one that is gone is not missed."""
        await in_thread(self._delete, keys)

    def _delete(self, keys: Sequence[str]) -> None:
        client = self.client()
        for key in keys:
            with translated("delete", f"{self._location.url}/{key}"):
                client.delete_object(Bucket=self._location.bucket, Key=join(self._location.path, key), **self._payer())

    async def check_listing(self) -> None:
        """Asks for a listing that seems empty once more, since anything but a listing reads as one to obstore.

        Raises:
            StoreUnavailable: it is none, such as a proxy's page.
        """
        await in_thread(self._check_listing)

    def _check_listing(self) -> None:
        with translated("list", self._location.url):
            answer = self.client().list_objects_v2(Bucket=self._location.bucket, MaxKeys=1, **self._payer())
        if aws_errors.is_no_listing(answer):
            raise web_page(200, "list", self._location.url)

    async def days_to_abort(self) -> int | None:
        """Days after which a lifecycle rule ends unfinished uploads below this location; None without such a rule."""
        return await in_thread(self._days_to_abort)

    def _days_to_abort(self) -> int | None:
        with translated("read lifecycle rules", self._location.url):
            try:
                answer = self.client().get_bucket_lifecycle_configuration(Bucket=self._location.bucket)
            except botocore.exceptions.ClientError as error:
                if error.response.get("Error", {}).get("Code") == "NoSuchLifecycleConfiguration":
                    return None
                raise
        days = [
            rule["AbortIncompleteMultipartUpload"]["DaysAfterInitiation"]
            for rule in answer.get("Rules", [])
            if rule.get("Status") == "Enabled"
            and "AbortIncompleteMultipartUpload" in rule
            and self._location.path.startswith(_prefix_of(rule))
        ]
        return min(days) if days else None

    async def region(self) -> str | None:
        """HeadBucket, whose answer names the bucket's region even where it is a refusal."""
        return await in_thread(self._region)

    def _region(self) -> str | None:
        try:
            answer = self.client().head_bucket(Bucket=self._location.bucket)
        except botocore.exceptions.ClientError as error:
            answer = error.response
        except botocore.exceptions.BotoCoreError:
            return None
        headers: dict[str, str] = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {})
        return headers.get("x-amz-bucket-region")

    def _list(self, prefix: str) -> Iterator[UnfinishedUpload]:
        root = self._location.path
        below = join(root, prefix) if prefix else root
        where = {"Bucket": self._location.bucket, "Prefix": f"{below}/" if below else "", **self._payer()}
        with translated("list uploads", self._location.url):
            for page in self.client().get_paginator("list_multipart_uploads").paginate(**where):
                for upload in page.get("Uploads", []):
                    key = upload["Key"].removeprefix(f"{root}/" if root else "")
                    yield UnfinishedUpload(key, upload["UploadId"], upload["Initiated"].timestamp())

    def _abort(self, upload: UnfinishedUpload) -> None:
        key = join(self._location.path, upload.key)
        client = self.client()
        with translated("abort upload", f"{self._location.url}/{upload.key}"):
            try:
                client.abort_multipart_upload(
                    Bucket=self._location.bucket, Key=key, UploadId=upload.id, **self._payer()
                )
            except client.exceptions.NoSuchUpload:
                pass

    def _payer(self) -> dict[str, str]:
        return {"RequestPayer": "requester"} if self._options.requester_pays else {}

    def client(self) -> Any:
        """A boto3 client for the location, which sends every request once."""
        options = self._options
        virtual = aws.virtual_hosted_style(self._chain, options, self._endpoint, self._location.bucket)
        config: dict[str, Any] = {
            "retries": {"total_max_attempts": 1},
            "connect_timeout": options.connect_timeout_s,
            "read_timeout": options.request_timeout_s,
            "s3": {"addressing_style": "virtual" if virtual else "path"},
        }
        if options.anonymous:
            config["signature_version"] = botocore.UNSIGNED
        return self._chain.create_client(
            "s3",
            region_name=aws.region(self._chain),
            endpoint_url=self._endpoint,
            config=Config(**config),
        )


def _prefix_of(rule: dict[str, Any]) -> str:
    """Below which a lifecycle rule applies; one with further conditions is taken for one that applies nowhere."""
    filtered = rule.get("Filter", {})
    if set(filtered) - {"Prefix"}:
        return "\0"
    return str(filtered.get("Prefix", rule.get("Prefix", "")))
