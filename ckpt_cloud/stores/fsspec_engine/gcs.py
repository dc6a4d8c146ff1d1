"""Google Cloud Storage and servers of its JSON API, through gcsfs: its session, its credentials, and one request each.

A version is a generation. Large objects are uploaded as components, objects of their own named `<key>.part-<id>-<n>`,
and composed; whoever dies before that leaves components behind, which `list_uploads` finds and listings show.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import itertools
import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Any

from crc32c import crc32c

from ckpt_cloud.errors import BucketNotFound, CkptCloudError, PreconditionFailed, StoreUnavailable
from ckpt_cloud.options import StoreOptions
from ckpt_cloud.stores import google_settings
from ckpt_cloud.stores.base import ANY, CREATE, Condition, ObjectInfo, Replace, UnfinishedUpload
from ckpt_cloud.stores.foreign_errors import BY_CODE
from ckpt_cloud.stores.fsspec_engine.base import Page, Root
from ckpt_cloud.stores.fsspec_engine.errors import of_gcs
from ckpt_cloud.stores.fsspec_engine.loops import at_once, close_on
from ckpt_cloud.stores.fsspec_engine.parts import Part, streamed
from ckpt_cloud.stores.fsspec_engine.uploads import UploadingStore
from ckpt_cloud.stores.location import Location
from ckpt_cloud.workers import in_thread

_COMPOSED = 32
"""Most sources of one compose request."""
_LANES = 16
"""Requests at once where one operation needs many."""
_NEVER = "1"
"""A generation that no object has: they are times in microseconds."""
_PAGE = "1000"
_COMPONENT = re.compile(r"(?P<key>.+)\.part-(?P<id>[0-9a-f]{12})-(?:[0-9]{5}|c[0-9]+-[0-9]{5})")
_FIELDS = "name,size,generation,updated,crc32c"


@dataclass(slots=True)
class _Upload:
    """Components under way; `names` are those that were begun."""

    path: str
    id: str = field(default_factory=lambda: secrets.token_hex(6))
    names: list[str] = field(default_factory=list)

    def name(self, label: str) -> str:
        self.names.append(f"{self.path}.part-{self.id}-{label}")
        return self.names[-1]


class GCSStore(UploadingStore):
    """Objects of one bucket."""

    delete_batch = 200

    def __init__(self, fs: Any, root: Root, options: StoreOptions) -> None:
        super().__init__(fs, root, options, of_gcs)
        request = type(fs)._request  # noqa: SLF001 - its public methods send a request again
        self._once = getattr(request, "__wrapped__", request)

    async def _write(self, path: str, pieces: Sequence[memoryview], condition: Condition) -> str | None:
        kept = {} if condition is ANY else {"ifGenerationMatch": _generation(condition)}
        return str((await self._insert(path, pieces, **kept))["generation"])

    async def _insert(self, path: str, pieces: Sequence[memoryview], **parameters: str) -> Any:
        """A multipart upload in HTTP's sense: emulators ignore conditions on others.

        Google refuses it if what arrives has another CRC32C than is said here.
        """
        boundary = secrets.token_hex(16)
        sum_ = base64.b64encode((await in_thread(_crc32c, pieces)).to_bytes(4, "big")).decode()
        about = json.dumps({"name": path, "contentType": "application/octet-stream", "crc32c": sum_})
        head = (
            f"--{boundary}\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n{about}\r\n"
            f"--{boundary}\r\nContent-Type: application/octet-stream\r\n\r\n"
        ).encode()
        tail = f"\r\n--{boundary}--".encode()
        headers = {
            "Content-Type": f'multipart/related; boundary="{boundary}"',
            "Content-Length": str(len(head) + sum(map(len, pieces)) + len(tail)),
        }
        url = f"{self._fs._location}/upload/storage/v1/b/{self._root.bucket}/o"  # noqa: SLF001 - no public name
        body = streamed([memoryview(head), *pieces, memoryview(tail)])
        try:
            return await self._json("POST", url, headers=headers, data=body, uploadType="multipart", **parameters)
        except FileNotFoundError:
            raise self._no_bucket() from None

    async def _fetch(self, path: str, limit: int) -> tuple[bytes, ObjectInfo]:
        info = _info(await self._about(path))
        if info.size == 0 or info.size > limit:
            return b"", info
        _, data = await self._media(path, {}, info.version)
        return data, info

    async def _read(self, path: str, start: int, end: int, version: str | None) -> bytes:
        status, data = await self._media(path, {"Range": f"bytes={start}-{end - 1}"}, version)
        if status != 206 and start > 0:
            raise StoreUnavailable("read: the store sent the whole object for a range of it", self._url_of(path))
        return data

    async def _media(self, path: str, headers: dict[str, str], version: str | None) -> tuple[int, bytes]:
        """The object's bytes, of exactly `version`: emulators ignore the condition, but say which version they sent."""
        url = f"{self._fs._location}/download/storage/v1/b/{{}}/o/{{}}"  # noqa: SLF001 - no public name
        kept = {} if version is None else {"ifGenerationMatch": version}
        where = (self._root.bucket, path)
        try:
            status, answered, _, data = await self._once(
                self._fs, "GET", url, *where, headers=headers, alt="media", **kept
            )
        except FileNotFoundError:
            await self._check_bucket()
            raise
        if version is not None and answered.get("X-Goog-Generation", version) != version:
            raise PreconditionFailed("read: the object is another version", self._url_of(path))
        return status, data

    async def _size(self, path: str) -> int:
        return _info(await self._about(path)).size

    async def _about(self, path: str) -> Any:
        try:
            return await self._json("GET", "b/{}/o/{}", self._root.bucket, path, fields=_FIELDS)
        except FileNotFoundError:
            await self._check_bucket()
            raise

    async def _page(self, below: str, token: Any, *, flat: bool) -> Page:
        asked = {
            "prefix": below or None,
            "pageToken": token,
            "delimiter": None if flat else "/",
            "maxResults": _PAGE,
            "fields": f"items({_FIELDS}),prefixes,nextPageToken",
        }
        try:
            answer = await self._json("GET", "b/{}/o", self._root.bucket, **asked)
        except FileNotFoundError:
            raise self._no_bucket() from None
        # A name that ends with a slash is a folder that some tool drew.
        infos = [_info(item) for item in answer.get("items", []) if not item["name"].endswith("/")]
        return Page(infos, answer.get("prefixes", []), answer.get("nextPageToken") or None)

    async def _delete_one(self, path: str) -> None:
        await self._once(self._fs, "DELETE", "b/{}/o/{}", self._root.bucket, path)

    async def _uploads(self, below: str) -> Sequence[UnfinishedUpload]:
        """By key and id, with the time of the oldest component."""
        oldest: dict[tuple[str, str], float] = {}
        for info in await self._components(below):
            found = _COMPONENT.fullmatch(info.key)
            if found:
                which = found["key"], found["id"]
                oldest[which] = min(info.modified_unix_s, oldest.get(which, info.modified_unix_s))
        return [UnfinishedUpload(key, id_, started) for (key, id_), started in oldest.items()]

    async def _components(self, below: str) -> Sequence[ObjectInfo]:
        found: list[ObjectInfo] = []
        token: Any = None
        while True:
            page = await self._page(below, token, flat=True)
            found += [info for info in page.infos if _COMPONENT.fullmatch(info.key)]
            token = page.token
            if token is None:
                return found

    async def _begin(self, path: str) -> _Upload:
        return _Upload(path)

    async def _send(self, upload: _Upload, number: int, part: Part) -> str:
        name = upload.name(f"{number:05}")
        await self._insert(name, part.pieces)
        return name

    async def _complete(self, upload: _Upload, sent: Sequence[str]) -> str | None:
        level = itertools.count()
        names = list(sent)
        while len(names) > _COMPOSED:
            groups = [names[at : at + _COMPOSED] for at in range(0, len(names), _COMPOSED)]
            targets = [upload.name(f"c{next(level)}-{number:05}") for number in range(len(groups))]
            composing = [partial(self._compose, *each) for each in zip(targets, groups, strict=True)]
            await at_once(composing, limit=_LANES)
            names = targets
        done = await self._compose(upload.path, names)
        # The object is there, whatever becomes of these.
        with contextlib.suppress(Exception):
            await self._delete(upload.names)
        return str(done["generation"])

    async def _compose(self, path: str, names: Sequence[str]) -> Any:
        asked = {
            "kind": "storage#composeRequest",
            "sourceObjects": [{"name": name} for name in names],
            "destination": {"contentType": "application/octet-stream"},
        }
        return await self._json("POST", "b/{}/o/{}/compose", self._root.bucket, path, json=asked)

    async def _abort(self, upload: _Upload | tuple[str, str]) -> None:
        if isinstance(upload, tuple):
            path, id_ = upload
            names = [info.key for info in await self._components(f"{path}.part-{id_}-")]
        else:
            names = upload.names
        for _, error in (await self._delete(names))[:1]:
            raise error

    async def _json(self, method: str, path: str, *where: str, **request: Any) -> Any:
        _, _, _, contents = await self._once(self._fs, method, path, *where, **request)
        return json.loads(contents)

    async def _check_bucket(self) -> None:
        """Tells an object that is not there from a bucket that is not: both are a bare 404."""
        try:
            await self._json("GET", "b/{}/o", self._root.bucket, maxResults="1", fields="kind")
        except FileNotFoundError:
            raise self._no_bucket() from None
        except Exception:  # noqa: BLE001 - the first answer says it
            return

    def _no_bucket(self) -> CkptCloudError:
        _, message, hint = BY_CODE["NoSuchBucket"]
        return BucketNotFound(message, self.url, hint)

    def _endpoint(self) -> str:
        return str(self._fs._location)  # noqa: SLF001 - no public name


def make_gcs(location: Location, options: StoreOptions) -> Any:
    """A gcsfs filesystem from `options` and, for the rest, what Google's libraries would use.

    Raises:
        MissingCredentials, FixRequest: from the configuration.
    """
    # Its newer subclass asks each bucket's layout over gRPC, which emulators answer after a minute, by a timeout.
    from gcsfs.core import GCSFileSystem

    arguments: dict[str, Any] = {
        "token": "anon" if google_settings.unsigned(options) else google_settings.credentials(options, location.url),
        "endpoint_url": google_settings.endpoint_url(options, location.url),
        "requester_pays": google_settings.payer(options, location.url) or False,
        "session_kwargs": _session(options),
        "skip_instance_cache": True,
        "use_listings_cache": False,
    }
    if options.project:
        arguments["project"] = options.project
    fs = GCSFileSystem(**{**arguments, **(options.filesystem_options or {})})
    fs.close_session = _close
    return fs


def _session(options: StoreOptions) -> dict[str, Any]:
    """Of aiohttp. A proxy comes from the environment unless it is given."""
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=options.connect_timeout_s)
    session: dict[str, Any] = {"timeout": timeout, "trust_env": options.proxy_url is None}
    if options.proxy_url:
        session["proxy"] = options.proxy_url
    if options.ca_bundle:
        import ssl

        from fsspec.asyn import get_loop, sync

        async def connector() -> aiohttp.TCPConnector:
            trusted = ssl.create_default_context()
            trusted.load_verify_locations(options.ca_bundle)
            return aiohttp.TCPConnector(ssl=trusted)

        # It belongs to the loop that it is made on.
        session["connector"] = sync(get_loop(), connector)
    return session


def _close(loop: Any, session: Any, asynchronous: bool = False) -> None:  # noqa: ARG001, FBT002 - gcsfs calls it
    from fsspec.asyn import get_loop

    close_on(loop or get_loop(), session.close)


def _generation(condition: Condition) -> str:
    if condition is CREATE:
        return "0"
    assert isinstance(condition, Replace)
    return condition.version if condition.version.isdigit() else _NEVER


def _info(item: Any) -> ObjectInfo:
    # Python 3.11 reads Google's "Z".
    modified = datetime.fromisoformat(item["updated"]).timestamp()
    sum_ = _decoded(item.get("crc32c", ""))
    return ObjectInfo(item["name"], int(item.get("size", 0)), str(item["generation"]), modified, sum_)


def _decoded(text: str) -> int | None:
    """Of Base64 in the order of the network."""
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
    return int.from_bytes(data, "big") if len(data) == 4 else None


def _crc32c(pieces: Sequence[memoryview]) -> int:
    found = 0
    for piece in pieces:
        found = crc32c(piece, found)
    return found
