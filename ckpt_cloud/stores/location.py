"""URLs, parsed: which scheme, engine, bucket and path."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace

from ckpt_cloud.errors import InvalidURL
from ckpt_cloud.options import Engine

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_MANGLED = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
"""`s3:/bucket/run`: what `pathlib.Path` makes of a URL."""
_BY_FSSPEC = "fsspec+"
_AZURE = ("az", "abfs", "abfss")
_GOOGLE = ("gs", "gcs")
_CLOUDS = ("s3", *_GOOGLE, *_AZURE)
_NAME = re.compile(r"[A-Za-z0-9._-]+")
"""More than any store takes, but nothing that must be encoded."""
_SPECIAL = ("$web", "$root")
"""Containers of Azure's own."""
SCHEMES = ("s3", *_GOOGLE, *_AZURE, "file", "memory")
"""What is known without asking fsspec."""


@dataclass(frozen=True, slots=True)
class Location:
    """A parsed checkpoint URL.

    Attributes:
        scheme: one of `SCHEMES`, or another that fsspec knows.
        bucket: bucket or container, or a host; empty for files.
        path: without slashes at its ends; absolute, with its leading slash, for files.
        account: the host after `container@` in `abfs[s]://`, empty otherwise.
        engine: `fsspec` if the URL begins with `fsspec+`, None if it leaves the choice.
    """

    scheme: str
    bucket: str
    path: str
    account: str = ""
    engine: Engine | None = None

    @property
    def url(self) -> str:
        """The URL in normal form."""
        forced = _BY_FSSPEC if self.engine == "fsspec" else ""
        if self.scheme == "file":
            return f"{forced}file://{self.path}"
        authority = f"{self.bucket}@{self.account}" if self.account else self.bucket
        return f"{forced}{self.scheme}://{authority}/{self.path}".rstrip("/")

    @property
    def dialect(self) -> str:
        """What is spoken there: `s3`, `gcs`, `azure`, or the scheme."""
        if self.scheme in _AZURE:
            return "azure"
        return "gcs" if self.scheme in _GOOGLE else self.scheme

    def child(self, name: str) -> Location:
        """The location `name` below this one."""
        return replace(self, path=f"{self.path}/{name}".lstrip("/" if self.scheme != "file" else ""))


def parse_url(url: str | os.PathLike[str]) -> Location:
    """The location that `url`, or a bare local path, means. Nothing in it is percent-decoded.

    Raises:
        InvalidURL: unknown scheme, no bucket, `..` in the path, or a password or query, which may hold secrets.
    """
    text = os.fspath(url)
    scheme, separator, rest = text.partition("://")
    scheme = scheme.lower()
    if not separator:
        if _MANGLED.match(text):
            raise InvalidURL("a URL that lost a slash", text, "keep URLs as str: pathlib.Path turns // into /")
        return _file(text)
    engine: Engine | None = "fsspec" if scheme.startswith(_BY_FSSPEC) else None
    scheme = scheme.removeprefix(_BY_FSSPEC)
    if scheme in ("file", "local"):
        return _file(rest.removeprefix("localhost") if rest.startswith("localhost/") else rest, engine)
    if scheme not in SCHEMES and not _fsspec_knows(scheme):
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise InvalidURL(f"unknown scheme {scheme}://", text, f"use {known}, another that fsspec knows, or a path")
    authority, _, path = rest.partition("/")
    bucket, account = _split(authority, scheme, text, has_query="?" in rest)
    return Location(scheme, bucket, _segments(path, text), account, engine)


def supports(url: str | os.PathLike[str]) -> bool:
    """Whether `url` can be opened at all, judged by its form."""
    try:
        parse_url(url)
    except (InvalidURL, TypeError):
        return False
    return True


def _fsspec_knows(scheme: str) -> bool:
    from fsspec.registry import available_protocols

    return scheme in available_protocols()


def _split(authority: str, scheme: str, text: str, *, has_query: bool) -> tuple[str, str]:
    """Bucket and account."""
    hint = "write scheme://bucket/path; credentials go into the environment or StoreOptions, never into the URL"
    if scheme in SCHEMES:
        bucket, at, account = authority.partition("@")
        foreign = at and (scheme not in ("abfs", "abfss") or not account)
        if not bucket or foreign or {"@", ":"} & {*bucket, *account} or has_query:
            raise InvalidURL("the URL needs a bucket and may have no user and no query", text, hint)
        if scheme in _CLOUDS and not _NAME.fullmatch(bucket) and not (scheme in _AZURE and bucket in _SPECIAL):
            hint = "correct it; a placeholder may have been left in, such as {bucket}"
            raise InvalidURL(f"{bucket!r} is no name of a bucket", text, hint)
        return bucket, account
    user, at, _ = authority.rpartition("@")
    if not authority or has_query or (at and ":" in user):
        raise InvalidURL("the URL needs a host or bucket and may have no password and no query", text, hint)
    return authority, ""


def _file(path: str, engine: Engine | None = None) -> Location:
    if not path or _CONTROL.search(path):
        raise InvalidURL("an empty path, or one with control characters", path)
    return Location("file", "", os.path.abspath(path), engine=engine)


def _segments(path: str, text: str) -> str:
    parts = path.rstrip("/").split("/")
    if _CONTROL.search(text):
        raise InvalidURL("the URL has control characters", text)
    if any(part in (".", "..") for part in parts) or ("" in parts and parts != [""]):
        raise InvalidURL("the path has an empty, '.' or '..' segment", text, "write it in normal form")
    return "/".join(parts)
