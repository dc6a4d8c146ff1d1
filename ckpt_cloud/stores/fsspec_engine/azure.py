"""Azure Blob Storage, through adlfs: its account and credentials, and the SDK's requests with retries off."""

from __future__ import annotations

import secrets
import urllib.parse
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from azure.core.exceptions import ResourceExistsError, ResourceModifiedError

from ckpt_cloud.errors import FixRequest, RangeNotSatisfiable
from ckpt_cloud.options import StoreOptions
from ckpt_cloud.stores import azure_settings
from ckpt_cloud.stores.azure_identity import credential
from ckpt_cloud.stores.base import ANY, CREATE, Condition, ObjectInfo, Replace, UnfinishedUpload
from ckpt_cloud.stores.fsspec_engine.base import Page, Root
from ckpt_cloud.stores.fsspec_engine.errors import of_azure
from ckpt_cloud.stores.fsspec_engine.loops import close_on
from ckpt_cloud.stores.fsspec_engine.parts import Part, joined, streamed
from ckpt_cloud.stores.fsspec_engine.uploads import UploadingStore
from ckpt_cloud.stores.location import Location

_ONE_REQUEST = 1 << 20
"""Most bytes that the SDK is given to send as it likes; it copies them, and aiohttp warns of more."""
_UNCOMMITTED = "uncommitted"
"""Azure has no ids of uploads: a blob has blocks that are committed, and others."""
_Upload = tuple[str, str]


class AzureStore(UploadingStore):
    """Blobs of one container. An upload is its key and a token that the ids of its blocks begin with."""

    max_parts = 50_000
    max_part_bytes = 4000 << 20
    delete_batch = 200

    def __init__(self, fs: Any, root: Root, options: StoreOptions) -> None:
        super().__init__(fs, root, options, of_azure)
        self._once = _once(options)

    async def _write(self, path: str, pieces: Sequence[memoryview], condition: Condition) -> str | None:
        size = sum(map(len, pieces))
        if size > _ONE_REQUEST:
            upload = await self._begin(path)
            return await self._commit(upload, [await self._stage(upload, 0, pieces)], condition)
        blob = await self._blob(path)
        body, over = joined(pieces), condition is not CREATE
        return _quoted(
            (await blob.upload_blob(body, length=size, overwrite=over, **_kept(condition), **self._once))["etag"]
        )

    async def _fetch(self, path: str, limit: int) -> tuple[bytes, ObjectInfo]:
        stream = await (await self._blob(path)).download_blob(**self._once)
        info = _info(path, stream.properties)
        return (b"" if info.size > limit else await stream.readall()), info

    async def _read(self, path: str, start: int, end: int, version: str | None) -> bytes:
        pinned = _kept(ANY if version is None else Replace(version))
        blob = await self._blob(path)
        stream = await blob.download_blob(offset=start, length=end - start, **pinned, **self._once)
        size = int(str(stream.properties.content_range).rpartition("/")[2])
        if size < end:
            where = self._url_of(path)
            raise RangeNotSatisfiable(f"read: the object has {size} bytes, {end} were asked for", where)
        return bytes(await stream.readall())

    async def _size(self, path: str) -> int:
        return int((await (await self._blob(path)).get_blob_properties(**self._once)).size)

    async def _page(self, below: str, token: Any, *, flat: bool) -> Page:
        container = await self._container()
        # Metadata says what is a directory, on accounts that have such.
        asked = {"name_starts_with": below or None, "include": ["metadata"], **self._once}
        if flat:
            pages = container.list_blobs(**asked).by_page(continuation_token=token)
        else:
            pages = container.walk_blobs(delimiter="/", **asked).by_page(continuation_token=token)
        infos, folders = [], []
        async for item in await anext(pages):
            if item.get("size") is None:
                folders.append(item.name)
            elif not _is_directory(item):
                infos.append(_info(item.name, item))
        return Page(infos, folders, pages.continuation_token or None)

    async def _delete_one(self, path: str) -> None:
        await (await self._blob(path)).delete_blob(**self._once)

    async def _uploads(self, below: str) -> Sequence[UnfinishedUpload]:
        container = await self._container()
        asked = {"name_starts_with": below or None, **self._once}
        begun = {item.name: item async for item in container.list_blobs(include=["uncommittedblobs"], **asked)}
        # In this order, so that one that is committed in between counts as an object.
        async for item in container.list_blobs(**asked):
            begun.pop(item.name, None)
        # Without a time it is new: nobody may think it abandoned.
        now = datetime.now(UTC)
        return [
            UnfinishedUpload(name, _UNCOMMITTED, (item.last_modified or now).timestamp())
            for name, item in begun.items()
        ]

    async def _begin(self, path: str) -> _Upload:
        return path, secrets.token_hex(8)

    async def _send(self, upload: _Upload, number: int, part: Part) -> str:
        return await self._stage(upload, number, part.pieces)

    async def _complete(self, upload: _Upload, sent: Sequence[str]) -> str | None:
        return await self._commit(upload, sent, ANY)

    async def _stage(self, upload: _Upload, number: int, pieces: Sequence[memoryview]) -> str:
        path, token = upload
        # All ids of a blob have one length; the token keeps apart what two uploads of one key store.
        block = f"{token}-{number:05}"
        size = sum(map(len, pieces))
        await (await self._blob(path)).stage_block(block, streamed(pieces), length=size, **self._once)
        return block

    async def _commit(self, upload: _Upload, blocks: Sequence[str], condition: Condition) -> str | None:
        from azure.storage.blob import BlobBlock

        path, _ = upload
        named = [BlobBlock(block) for block in blocks]
        blob = await self._blob(path)
        return _quoted((await blob.commit_block_list(named, **_kept(condition), **self._once))["etag"])

    async def _abort(self, upload: _Upload) -> None:
        """Commits a list of no blocks, which drops all there are, and deletes the blob that this makes.

        Unless there is one by now: then the upload was completed, and is none any more.
        """
        path, _ = upload
        try:
            e_tag = await self._commit(upload, [], CREATE)
        except (ResourceExistsError, ResourceModifiedError):
            return
        assert e_tag is not None, "Azure names every version"
        await (await self._blob(path)).delete_blob(**_kept(Replace(e_tag)), **self._once)

    async def _blob(self, path: str) -> Any:
        await _send_once(self._fs.service_client)
        return self._fs.service_client.get_blob_client(self._root.bucket, path)

    async def _container(self) -> Any:
        await _send_once(self._fs.service_client)
        return self._fs.service_client.get_container_client(self._root.bucket)

    def _endpoint(self) -> str:
        return str(self._fs.service_client.primary_hostname)


def make_azure(location: Location, options: StoreOptions) -> Any:
    """An adlfs filesystem for the account that `options`, the URL and the environment name, in this order.

    Raises:
        MissingCredentials, FixRequest: from the configuration.
    """
    from adlfs import AzureBlobFileSystem

    account = azure_settings.account(location, options)
    arguments: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    signed = {"AccountKey": account.key} if account.key else {"SharedAccessSignature": (account.sas or "").lstrip("?")}
    if options.anonymous or account.key or account.sas:
        parts = {"AccountName": account.name, "BlobEndpoint": account.endpoint, **({} if options.anonymous else signed)}
        # Of all that adlfs takes, it overrides the environment, and can name an endpoint without TLS.
        arguments["connection_string"] = ";".join(f"{name}={value}" for name, value in parts.items())
    else:
        import azure.identity.aio

        host = urllib.parse.urlsplit(account.endpoint).netloc
        identity = credential(azure.identity.aio, options)
        arguments |= {"account_name": account.name, "account_host": host, "credential": identity}
    arguments |= options.filesystem_options or {}
    fs = AzureBlobFileSystem(**arguments)
    if fs.connection_string and "connection_string" not in arguments:
        hint = "unset AZURE_STORAGE_CONNECTION_STRING, which adlfs puts before all else"
        raise FixRequest(f"adlfs would use another account than {account.name}", location.url, hint)
    return fs


def close_azure(fs: Any) -> None:
    """Closes the connections; adlfs, which never lets go of a filesystem, does so only when the process ends."""

    async def close() -> None:
        await fs.service_client.close()
        if fs.credential is not None:
            await fs.credential.close()

    close_on(fs.loop, close)


def _once(options: StoreOptions) -> dict[str, Any]:
    """What goes with every request."""
    once: dict[str, Any] = {
        "retry_total": 0,
        "connection_timeout": options.connect_timeout_s,
        "read_timeout": options.request_timeout_s,
    }
    if options.ca_bundle:
        once["connection_verify"] = options.ca_bundle
    if options.proxy_url:
        once["proxies"] = {"http": options.proxy_url, "https": options.proxy_url}
    return once


async def _send_once(client: Any) -> None:
    """aiohttp sends a PUT again when a connection that was kept open breaks; not here."""
    transport = getattr(getattr(client, "_pipeline", None), "_transport", None)
    if transport is None or not hasattr(transport, "session"):
        return
    if transport.session is None:
        await transport.open()
    if getattr(transport.session, "_retry_connection", False):
        transport.session._retry_connection = False  # noqa: SLF001 - aiohttp has no public switch


def _kept(condition: Condition) -> dict[str, Any]:
    from azure.core import MatchConditions

    if condition is ANY:
        return {}
    if condition is CREATE:
        return {"match_condition": MatchConditions.IfMissing}
    assert isinstance(condition, Replace)
    return {"etag": condition.version, "match_condition": MatchConditions.IfNotModified}


def _is_directory(item: Any) -> bool:
    return item.name.endswith("/") or (item.metadata or {}).get("hdi_isfolder") == "true"


def _quoted(etag: str | None) -> str | None:
    """Listings leave out the quotes that belong to an ETag."""
    return '"{}"'.format(etag.strip('"')) if etag else None


def _info(path: str, properties: Any) -> ObjectInfo:
    return ObjectInfo(path, properties.size, _quoted(properties.etag), properties.last_modified.timestamp())
