"""URL to store."""

from __future__ import annotations

import os
import urllib.parse
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from obstore import store as obstores

from ckpt_cloud.errors import InvalidURL
from ckpt_cloud.options import RetryOptions, StoreOptions
from ckpt_cloud.stores import credentials
from ckpt_cloud.stores.base import ObjectStore
from ckpt_cloud.stores.foreign_errors import translated
from ckpt_cloud.stores.local import LocalStore
from ckpt_cloud.stores.native import NativeStore

SCHEMES = ("s3", "file", "memory")
_memory: dict[str, obstores.MemoryStore] = {}
"""`memory://NAME/…` of this process; gone with it."""


@dataclass(frozen=True, slots=True)
class Location:
    """A parsed checkpoint URL.

    Attributes:
        scheme: one of `SCHEMES`.
        bucket: empty for files.
        path: without slashes at its ends; absolute, with its leading slash, for files.
    """

    scheme: str
    bucket: str
    path: str

    @property
    def url(self) -> str:
        """The URL in normal form."""
        if self.scheme == "file":
            return f"file://{self.path}"
        return f"{self.scheme}://{self.bucket}/{self.path}".rstrip("/")

    def child(self, name: str) -> Location:
        """The location `name` below this one."""
        return Location(self.scheme, self.bucket, f"{self.path}/{name}".lstrip("/" if self.scheme != "file" else ""))


def parse_url(url: str | os.PathLike[str]) -> Location:
    """The location that `url`, or a bare local path, means. Nothing in it is percent-decoded.

    Raises:
        InvalidURL: unknown scheme, no bucket, `..` in the path, or a user, password or query, which may hold secrets.
    """
    text = os.fspath(url)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return _file(text)
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise InvalidURL(f"unknown scheme {scheme}://", text, f"use {known} or a local path")
    if scheme == "file":
        return _file(rest)
    bucket, _, path = rest.partition("/")
    if not bucket or "@" in bucket or "?" in rest:
        hint = "write scheme://bucket/path; credentials go into the environment or StoreOptions, never into the URL"
        raise InvalidURL("the URL needs a bucket and may have no user and no query", text, hint)
    return Location(scheme, bucket, _segments(path, text))


def supports(url: str | os.PathLike[str]) -> bool:
    """Whether `url` can be opened at all, judged by its form."""
    try:
        parse_url(url)
    except (InvalidURL, TypeError):
        return False
    return True


def open_store(location: Location, options: StoreOptions, *, first_contact: bool = False) -> ObjectStore:
    """A store for the objects under `location`. Talks to nobody yet.

    Args:
        first_contact: give up within `RetryOptions.first_contact_s`, for the request that shows whether the store is
            there at all.

    Raises:
        MissingCredentials, FixRequest: from the configuration.
    """
    with translated("open", location.url):
        if location.scheme == "memory":
            memory = _memory.setdefault(location.bucket, obstores.MemoryStore())
            return NativeStore(memory, memory, location.path, location.url)
        if location.scheme == "file":
            return LocalStore(obstores.LocalStore(automatic_cleanup=True), Path(location.path), location.url)
        return _s3(location, options, first_contact=first_contact)


def _file(path: str) -> Location:
    if not path or "\0" in path:
        raise InvalidURL("an empty path, or one with a NUL", path)
    return Location("file", "", os.path.abspath(path))


def _segments(path: str, text: str) -> str:
    parts = path.strip("/").split("/")
    if any(part in (".", "..") or "\0" in part for part in parts) or ("" in parts and parts != [""]):
        raise InvalidURL("the path has an empty, '.' or '..' segment", text, "write it in normal form")
    return "/".join(parts)


def _s3(location: Location, options: StoreOptions, *, first_contact: bool) -> NativeStore:
    chain = credentials.session(options, location.url)
    config: dict[str, Any] = {"unsigned_payload": True, "region": chain.region_name or "us-east-1"}
    endpoint = credentials.endpoint_url(chain, options)
    if endpoint:
        config["endpoint"] = endpoint
        config["aws_endpoint_url_s3"] = endpoint
    virtual = options.virtual_hosted_style if options.virtual_hosted_style is not None else not endpoint
    config["virtual_hosted_style_request"] = virtual
    if endpoint and virtual:
        config["endpoint"] = config["aws_endpoint_url_s3"] = _with_bucket(endpoint, location.bucket)
    if options.store_checksums:
        config["checksum_algorithm"] = "crc64nvme"
    extra: dict[str, Any] = {}
    if options.anonymous:
        config["skip_signature"] = True
    else:
        extra["credential_provider"] = credentials.credential_provider(chain, options, location.url)
    clients = [
        obstores.S3Store(location.bucket, config=config, client_options=_client(options, endpoint), retry_config=retry, **extra)
        for retry in (_retry(options.retry, first_contact=first_contact), {"max_retries": 0})
    ]
    return NativeStore(clients[0], clients[1], location.path, location.url)


def _with_bucket(endpoint: str, bucket: str) -> str:
    parts = urllib.parse.urlsplit(endpoint)
    return parts._replace(netloc=f"{bucket}.{parts.netloc}").geturl()


def _client(options: StoreOptions, endpoint: str | None) -> dict[str, Any]:
    client: dict[str, Any] = {
        "connect_timeout": timedelta(seconds=options.connect_timeout_s),
        "timeout": timedelta(seconds=options.request_timeout_s),
        "allow_http": bool(endpoint and endpoint.startswith("http://")),
    }
    if options.proxy_url:
        client["proxy_url"] = options.proxy_url
    bundle = credentials.ca_bundle(options)
    if bundle:
        client["root_certificate"] = bundle
    return client


def _retry(retry: RetryOptions, *, first_contact: bool) -> dict[str, Any]:
    deadline = min(retry.first_contact_s, retry.deadline_s) if first_contact else retry.deadline_s
    return {
        "max_retries": retry.max_retries,
        "retry_timeout": timedelta(seconds=deadline),
        "backoff": {
            "init_backoff": timedelta(milliseconds=100),
            "max_backoff": timedelta(seconds=min(retry.max_backoff_s, deadline / 4)),
            "base": 2,
        },
    }


