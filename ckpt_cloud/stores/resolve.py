"""URL to store."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from obstore import store as obstores

from ckpt_cloud.errors import InvalidURL
from ckpt_cloud.options import StoreOptions
from ckpt_cloud.stores import s3
from ckpt_cloud.stores.base import ObjectStore
from ckpt_cloud.stores.foreign_errors import translated
from ckpt_cloud.stores.local import LocalStore
from ckpt_cloud.stores.memory import MemoryStore

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_MANGLED = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
"""`s3:/bucket/run`: what `pathlib.Path` makes of a URL."""
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
    scheme = scheme.lower()
    if not separator:
        if _MANGLED.match(text):
            raise InvalidURL("a URL that lost a slash", text, "keep URLs as str: pathlib.Path turns // into /")
        return _file(text)
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise InvalidURL(f"unknown scheme {scheme}://", text, f"use {known} or a local path")
    if scheme == "file":
        return _file(rest.removeprefix("localhost") if rest.startswith("localhost/") else rest)
    bucket, _, path = rest.partition("/")
    if not bucket or {"@", ":"} & {*bucket} or "?" in rest:
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
            return MemoryStore(memory, memory, location.path, location.url)
        if location.scheme == "file":
            return LocalStore(obstores.LocalStore(), Path(location.path), location.url)
        return s3.open_s3(location.bucket, location.path, location.url, options, first_contact=first_contact)


def _file(path: str) -> Location:
    if not path or _CONTROL.search(path):
        raise InvalidURL("an empty path, or one with control characters", path)
    return Location("file", "", os.path.abspath(path))


def _segments(path: str, text: str) -> str:
    parts = path.rstrip("/").split("/")
    if _CONTROL.search(text):
        raise InvalidURL("the URL has control characters", text)
    if any(part in (".", "..") for part in parts) or ("" in parts and parts != [""]):
        raise InvalidURL("the path has an empty, '.' or '..' segment", text, "write it in normal form")
    return "/".join(parts)
