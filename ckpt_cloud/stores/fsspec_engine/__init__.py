"""The `fsspec` engine: s3fs, gcsfs, adlfs and every other fsspec filesystem, the user's own included."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

from ckpt_cloud.errors import FixRequest, Unsupported
from ckpt_cloud.format.layout import join
from ckpt_cloud.options import StoreOptions
from ckpt_cloud.stores.base import ObjectStore
from ckpt_cloud.stores.fsspec_engine.base import Root
from ckpt_cloud.stores.fsspec_engine.errors import of_files, translated
from ckpt_cloud.stores.location import Location

__all__ = ["open_fsspec"]

_LIBRARIES = {
    "s3": ("s3fs", "S3FileSystem"),
    "gcs": ("gcsfs", "GCSFileSystem"),
    "azure": ("adlfs", "AzureBlobFileSystem"),
}
"""Of each dialect that has an engine of its own; the extras bear the dialects' names."""


def open_fsspec(location: Location, options: StoreOptions) -> ObjectStore:
    """A store for the objects under `location`, in `options.filesystem` or in one made for it. Talks to nobody yet.

    Raises:
        Unsupported: the library is not installed, or the filesystem is for use inside coroutines only.
        MissingCredentials, FixRequest: from the configuration.
        StoreUnavailable, PermissionDenied: from filesystems that go to their server as they are made, such as FTP's.
    """
    if options.filesystem is not None:
        fs, path = _unwrapped(options.filesystem, location)
    else:
        fs, path = _made(location, options)
    if getattr(fs, "asynchronous", False):
        hint = "make it with asynchronous=False; ckpt_cloud awaits its coroutines all the same"
        raise Unsupported("the filesystem was made with asynchronous=True", location.url, hint)
    return _store(fs, path, location.url, options)


def _store(fs: Any, path: str, url: str, options: StoreOptions) -> ObjectStore:
    bucket, _, below = path.strip("/").partition("/")
    root = Root(url, bucket, below)
    dialect = _dialect(fs)
    if dialect == "s3":
        from ckpt_cloud.stores.fsspec_engine.s3 import S3Store

        return S3Store(fs, root, options)
    if dialect == "gcs":
        from ckpt_cloud.stores.fsspec_engine.gcs import GCSStore

        return GCSStore(fs, root, options)
    if dialect == "azure":
        from ckpt_cloud.stores.fsspec_engine.azure import AzureStore, close_azure

        store = AzureStore(fs, root, options)
        if options.filesystem is None:
            weakref.finalize(store, close_azure, fs)
        return store
    from ckpt_cloud.stores.fsspec_engine.files import FileStore, is_local
    from ckpt_cloud.stores.fsspec_engine.generic import GenericStore

    return (FileStore if is_local(fs) else GenericStore)(fs, Root(url, "", path), options)


def _dialect(fs: Any) -> str | None:
    """By the class's name, so that no library is imported for the filesystems of another."""
    names = {(kind.__module__.partition(".")[0], kind.__name__) for kind in type(fs).__mro__}
    return next((dialect for dialect, name in _LIBRARIES.items() if name in names), None)


def _unwrapped(fs: Any, location: Location) -> tuple[Any, str]:
    """A user's filesystem and the path of `location` in it; directories of filesystems are taken apart."""
    from fsspec.implementations.dirfs import DirFileSystem

    plain = replace(location, engine=None)
    path = join(location.bucket, location.path)
    if not isinstance(fs, DirFileSystem) and _dialect(fs) is None:
        protocols = (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol
        path = fs._strip_protocol(plain.url) if location.scheme in protocols else path  # noqa: SLF001 - fsspec's own way
    while isinstance(fs, DirFileSystem):
        fs, path = fs.fs, join(fs.path.rstrip("/"), path.lstrip("/"))
    return fs, path


def _made(location: Location, options: StoreOptions) -> tuple[Any, str]:
    path = join(location.bucket, location.path)
    library, _ = _LIBRARIES.get(location.dialect, ("", ""))
    try:
        if location.dialect == "s3":
            from ckpt_cloud.stores.fsspec_engine.s3 import make_s3

            return make_s3(location, options), path
        if location.dialect == "gcs":
            from ckpt_cloud.stores.fsspec_engine.gcs import make_gcs

            return make_gcs(location, options), path
        if location.dialect == "azure":
            from ckpt_cloud.stores.fsspec_engine.azure import make_azure

            return make_azure(location, options), path
        return _any(location, options)
    except ImportError as missing:
        hint = f"pip install 'ckpt-cloud[{location.dialect}]'" if library else str(missing)
        raise Unsupported(f"{location.scheme}:// needs {library or 'another package'}", location.url, hint) from None


def _any(location: Location, options: StoreOptions) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    given = {"skip_instance_cache": True, "use_listings_cache": False, **(options.filesystem_options or {})}
    try:
        fs, path = url_to_fs(replace(location, engine=None).url, **given)
    except (TypeError, ValueError) as error:
        hint = "give filesystem_options that it takes, or a filesystem"
        raise FixRequest(f"no filesystem could be made: {error}", location.url, hint) from None
    except ImportError:
        raise
    except Exception:
        # Some go to their server at once.
        with translated("open", location.url, of_files):
            raise
    return fs, path
