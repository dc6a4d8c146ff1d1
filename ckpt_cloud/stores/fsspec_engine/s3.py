"""S3 and servers that speak its dialect, through s3fs: its sessions and settings, and aiobotocore's requests.

s3fs's own methods send a request again when they think fit, so none is used: a conditional write that is sent twice
may be refused because of itself.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from functools import cache
from typing import Any

import botocore.exceptions

from ckpt_cloud.errors import CkptCloudError, RangeNotSatisfiable, StoreUnavailable, Unsupported
from ckpt_cloud.options import StoreOptions
from ckpt_cloud.stores import aws, aws_errors
from ckpt_cloud.stores.base import ANY, CREATE, Condition, ObjectInfo, Replace, UnfinishedUpload
from ckpt_cloud.stores.foreign_errors import web_page
from ckpt_cloud.stores.fsspec_engine.base import Failed, Page, Root
from ckpt_cloud.stores.fsspec_engine.errors import of_s3
from ckpt_cloud.stores.fsspec_engine.loops import close_on
from ckpt_cloud.stores.fsspec_engine.parts import Part, filled, joined
from ckpt_cloud.stores.fsspec_engine.uploads import UploadingStore
from ckpt_cloud.stores.location import Location

_CONNECTIONS = 64
_CHUNK = 1 << 20
"""Most bytes of a body that are taken at once."""
_ONCE = {"total_max_attempts": 1}
_NO_BULK = (400, 405, 501)
"""Answers of servers that do not know the request; GCS's XML API is one."""
_Key = tuple[str, str]


class S3Store(UploadingStore):
    """Objects of one bucket. An upload is its key and S3's id for it."""

    def __init__(self, fs: Any, root: Root, options: StoreOptions) -> None:
        super().__init__(fs, root, options, of_s3)
        self._control = _without_retries(fs)

    async def _write(self, path: str, pieces: Sequence[memoryview], condition: Condition) -> str | None:
        body = joined(pieces)
        if condition is ANY:
            return _etag(await self._call("put_object", Key=path, Body=body))
        kept = {"IfNoneMatch": "*"} if condition is CREATE else {"IfMatch": _version(condition)}
        return _etag(await self._call("put_object", fs=self._control, Key=path, Body=body, **kept))

    async def _fetch(self, path: str, limit: int) -> tuple[bytes, ObjectInfo]:
        response = await self._call("get_object", Key=path)
        async with response["Body"] as body:
            if "LastModified" not in response:
                raise web_page(200, "get", self._url_of(path))
            info = ObjectInfo(path, response["ContentLength"], _etag(response), response["LastModified"].timestamp())
            return (b"" if info.size > limit else await body.read()), info

    async def _read(self, path: str, start: int, end: int, version: str | None) -> bytearray:
        pinned = {} if version is None else {"IfMatch": version}
        response = await self._call("get_object", Key=path, Range=f"bytes={start}-{end - 1}", **pinned)
        async with response["Body"] as body:
            size = _whole_size(response)
            if size is not None and size < end:
                raise RangeNotSatisfiable(
                    f"read: the object has {size} bytes, {end} were asked for", self._url_of(path)
                )
            if response["ContentLength"] != end - start:
                came = response["ContentLength"]
                raise StoreUnavailable(f"read: {came} bytes came instead of {end - start}", self._url_of(path))
            return await filled(end - start, body.iter_chunks(_CHUNK))

    async def _size(self, path: str) -> int:
        return int((await self._call("head_object", Key=path))["ContentLength"])

    async def _page(self, below: str, token: Any, *, flat: bool) -> Page:
        more = {"ContinuationToken": token} if token else {}
        level = {} if flat else {"Delimiter": "/"}
        answer = await self._call("list_objects_v2", Prefix=below, **level, **more)
        if aws_errors.is_no_listing(answer):
            raise web_page(200, "list", self.url)
        infos = [
            ObjectInfo(entry["Key"], entry["Size"], _etag(entry), entry["LastModified"].timestamp())
            for entry in answer.get("Contents", [])
            # A name that ends with a slash is a folder that some tool drew.
            if not entry["Key"].endswith("/")
        ]
        folders = [entry["Prefix"] for entry in answer.get("CommonPrefixes", [])]
        return Page(infos, folders, answer.get("NextContinuationToken") if answer.get("IsTruncated") else None)

    async def _delete(self, paths: Sequence[str]) -> Sequence[Failed]:
        try:
            objects = [{"Key": path} for path in paths]
            answer = await self._call("delete_objects", Delete={"Objects": objects, "Quiet": True})
        except botocore.exceptions.ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] not in _NO_BULK:
                raise
            return await super()._delete(paths)
        errors = [entry for entry in answer.get("Errors", []) if entry.get("Code") != "NoSuchKey"]
        return [(entry["Key"], self._refusal(entry)) for entry in errors]

    async def _delete_one(self, path: str) -> None:
        await self._call("delete_object", Key=path)

    async def _uploads(self, below: str) -> Sequence[UnfinishedUpload]:
        found: list[UnfinishedUpload] = []
        more: dict[str, str] = {}
        while True:
            answer = await self._call("list_multipart_uploads", Prefix=below, **more)
            found += [
                UnfinishedUpload(entry["Key"], entry["UploadId"], entry["Initiated"].timestamp())
                for entry in answer.get("Uploads", [])
            ]
            if not answer.get("IsTruncated"):
                return found
            more = {"KeyMarker": answer["NextKeyMarker"], "UploadIdMarker": answer.get("NextUploadIdMarker", "")}

    async def _begin(self, path: str) -> _Key:
        return path, (await self._call("create_multipart_upload", Key=path))["UploadId"]

    async def _send(self, upload: _Key, number: int, part: Part) -> dict[str, Any]:
        path, id_ = upload
        answer = await self._call(
            "upload_part", Key=path, UploadId=id_, PartNumber=number + 1, Body=joined(part.pieces)
        )
        sums = {name: value for name, value in answer.items() if name.startswith("Checksum") and name != "ChecksumType"}
        return {"PartNumber": number + 1, "ETag": answer["ETag"], **sums}

    async def _complete(self, upload: _Key, sent: Sequence[Any]) -> str | None:
        path, id_ = upload
        parts = {"Parts": list(sent)}
        return _etag(await self._call("complete_multipart_upload", Key=path, UploadId=id_, MultipartUpload=parts))

    async def _abort(self, upload: _Key) -> None:
        path, id_ = upload
        try:
            await self._call("abort_multipart_upload", Key=path, UploadId=id_)
        except botocore.exceptions.ClientError as error:
            if error.response["Error"]["Code"] != "NoSuchUpload":
                raise

    def _endpoint(self) -> str:
        client = getattr(self._fs, "_s3", None)
        # A user's own may have it from the environment.
        return str(client.meta.endpoint_url if client else self._fs.endpoint_url or "s3")

    async def _call(self, name: str, *, fs: Any = None, **given: Any) -> Any:
        """One request, with what the filesystem adds to each, such as encryption."""
        fs = fs or self._fs
        given["Bucket"] = self._root.bucket
        await fs.set_session()
        method = getattr(await fs.get_s3(self._root.bucket), name)
        arguments = fs._get_s3_method_kwargs(method, fs.req_kw, **given)  # noqa: SLF001 - s3fs has no other name for it
        unknown = given.keys() - arguments.keys()
        if unknown:
            hint = "pip install -U 'ckpt-cloud[s3]'"
            raise Unsupported(f"this version of botocore does not know {', '.join(sorted(unknown))}", self.url, hint)
        return await method(**arguments)

    def _refusal(self, entry: Any) -> CkptCloudError:
        error = botocore.exceptions.ClientError({"Error": entry}, "DeleteObjects")
        return aws_errors.translate(error, "delete", self._url_of(entry["Key"]))


def make_s3(location: Location, options: StoreOptions) -> Any:
    """An s3fs filesystem from `options` and, for the rest, what boto3 would use. Sends nothing again.

    Raises:
        FixRequest: the AWS configuration cannot be used.
    """
    from aiobotocore.config import AioConfig  # type: ignore[import-untyped]
    from aiobotocore.session import AioSession  # type: ignore[import-untyped]
    from s3fs import S3FileSystem

    chain = aws.session(options, location.url, AioSession, AioConfig)
    aws.ca_bundle(chain, location.url)
    endpoint = aws.endpoint_url(chain, options, location.url)
    arguments: dict[str, Any] = {
        "anon": options.anonymous,
        "session": chain,
        "endpoint_url": endpoint,
        "requester_pays": options.requester_pays,
        "client_kwargs": {"region_name": aws.region(chain)},
        "config_kwargs": _config(chain, options, endpoint, location.bucket),
        "s3_additional_kwargs": _encryption(options),
        "skip_instance_cache": True,
        "use_listings_cache": False,
    }
    fs = S3FileSystem(**{**arguments, **(options.filesystem_options or {})})
    fs.close_session = _close
    return fs


def _config(chain: Any, options: StoreOptions, endpoint: str | None, bucket: str) -> dict[str, Any]:
    virtual = aws.virtual_hosted_style(chain, options, endpoint, bucket)
    checksums = "when_supported" if aws.store_checksums(chain, options) else "when_required"
    config: dict[str, Any] = {
        "retries": _ONCE,
        "connect_timeout": options.connect_timeout_s,
        "read_timeout": options.request_timeout_s,
        "max_pool_connections": _CONNECTIONS,
        "request_checksum_calculation": checksums,
        "response_checksum_validation": checksums,
        # TLS protects payloads on the way, and our own checksums from there on.
        "s3": {"addressing_style": "virtual" if virtual else "path", "payload_signing_enabled": False},
        **_session(),
    }
    return config


def _encryption(options: StoreOptions) -> dict[str, Any]:
    """What goes with every request that takes it; s3fs leaves it out of the others."""
    given: dict[str, Any] = {
        "ServerSideEncryption": options.server_side_encryption,
        "SSEKMSKeyId": options.sse_kms_key_id,
        "BucketKeyEnabled": options.sse_bucket_key,
    }
    if options.sse_customer_key:
        given |= {"SSECustomerAlgorithm": "AES256", "SSECustomerKey": base64.b64decode(options.sse_customer_key)}
    return {name: value for name, value in given.items() if value is not None}


def _without_retries(fs: Any) -> Any:
    """`fs`, or one like it whose client sends nothing again."""
    if fs.config_kwargs.get("retries") == _ONCE and _session().items() <= fs.config_kwargs.items():
        return fs
    config = {**fs.config_kwargs, "retries": _ONCE, **_session()}
    extra = {"config_kwargs": config, "skip_instance_cache": True, "use_listings_cache": False}
    control = type(fs)(*fs.storage_args, **{**fs.storage_options, **extra})
    control.close_session = _close
    return control


@cache
def _session() -> dict[str, Any]:
    """Sessions that send nothing again, if there are such: aiohttp does when a kept connection breaks."""
    import inspect

    from aiobotocore.config import AioConfig
    from aiobotocore.httpsession import AIOHTTPSession  # type: ignore[import-untyped]

    if "http_session_cls" not in inspect.signature(AioConfig).parameters:
        return {}

    class OnceSession(AIOHTTPSession):  # type: ignore[misc]
        async def _get_session(self, proxy_url: str | None) -> Any:
            session = await super()._get_session(proxy_url)
            session._retry_connection = False  # noqa: SLF001 - https://github.com/aio-libs/aiohttp has no public switch
            return session

    return {"http_session_cls": OnceSession}


def _close(loop: Any, client: Any) -> None:
    close_on(loop, lambda: client.__aexit__(None, None, None))


def _etag(answer: Any) -> str | None:
    return answer.get("ETag")  # type: ignore[no-any-return]


def _version(condition: Condition) -> str:
    assert isinstance(condition, Replace)
    return condition.version


def _whole_size(response: Any) -> int | None:
    """From `Content-Range: bytes 0-9/10`."""
    total = str(response.get("ContentRange", "")).rpartition("/")[2]
    return int(total) if total.isdigit() else None
