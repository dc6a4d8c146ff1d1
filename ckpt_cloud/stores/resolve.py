"""URL to store: which engine, and what wraps it."""

from __future__ import annotations

import contextlib
import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt_cloud.errors import CkptCloudError, InvalidOption, MissingCredentials, Unsupported
from ckpt_cloud.options import Engine, StoreOptions
from ckpt_cloud.stores.base import ObjectStore
from ckpt_cloud.stores.foreign_errors import translated
from ckpt_cloud.stores.intercept import apply
from ckpt_cloud.stores.location import Location
from ckpt_cloud.stores.paced import PacedStore
from ckpt_cloud.stores.reaching import address, authorities

if TYPE_CHECKING:
    from obstore.store import MemoryStore as ObstoreMemory

NATIVE = ("s3", "gcs", "azure", "file", "memory")
"""Dialects of the native engine."""
DEFAULT_ENGINES: dict[str, Engine] = {
    "s3": "native",
    "gcs": "fsspec",
    "azure": "native",
    "file": "native",
    "memory": "native",
}
"""By dialect; every other scheme is fsspec's."""
_MODULES = {
    ("native", "s3"): "ckpt_cloud.stores.s3",
    ("native", "gcs"): "ckpt_cloud.stores.gcs",
    ("native", "azure"): "ckpt_cloud.stores.azure",
    ("native", "file"): "ckpt_cloud.stores.local",
    ("native", "memory"): "ckpt_cloud.stores.memory",
    ("fsspec", ""): "ckpt_cloud.stores.fsspec_engine",
}
_memory: dict[str, ObstoreMemory] = {}
"""`memory://NAME/…` of this process; gone with it."""


def open_store(location: Location, options: StoreOptions, *, first_contact: bool = False) -> ObjectStore:
    """A store for the objects under `location`. Talks to nobody yet.

    Args:
        first_contact: give up within `RetryOptions.first_contact_s`, for the request that shows whether the store is
            there at all.

    Raises:
        MissingCredentials, FixRequest: from the configuration.
        Unsupported: the engine does not do this scheme, or its library is not installed.
    """
    store = _unpaced(location, options)
    return _patient(store, location, options, first_contact=first_contact)


def open_both(location: Location, options: StoreOptions) -> tuple[ObjectStore, ObjectStore]:
    """What `open_store` gives with `first_contact`, and without, on the same connections."""
    store = _unpaced(location, options)
    control = _patient(store, location, options, first_contact=True)
    return control, _patient(store, location, options, first_contact=False)


def import_engine(location: Location, options: StoreOptions) -> None:
    """Imports what `open_store` will need, which takes longer than to open one; says nothing of what is missing."""
    with contextlib.suppress(CkptCloudError, ImportError):
        engine = engine_for(location, options)
        importlib.import_module(_MODULES.get((engine, location.dialect), _MODULES["fsspec", ""]))


def _patient(store: ObjectStore, location: Location, options: StoreOptions, *, first_contact: bool) -> ObjectStore:
    """`store` with retries and pace, unless it is on this machine."""
    if engine_for(location, options) == "native" and location.dialect in ("file", "memory"):
        return apply(store)
    return apply(PacedStore(store, options, first_contact=first_contact))


def _unpaced(location: Location, options: StoreOptions) -> ObjectStore:
    """The store as its engine has it."""
    _check_whole(location, options)
    if engine_for(location, options) == "fsspec":
        from ckpt_cloud.stores.fsspec_engine import open_fsspec

        return open_fsspec(location, options)
    if location.dialect == "memory":
        return _open_memory(location)
    if location.dialect == "file":
        return _open_local(location)
    return _open_cloud(location, options)


def _check_whole(location: Location, options: StoreOptions) -> None:
    """Refuses what is no proxy or CA bundle, and options that lost on their way to another process what said where."""
    if options.proxy_url:
        address(options.proxy_url, "proxy_url", location.url)
    if options.ca_bundle:
        authorities(options.ca_bundle, location.url)
    for name in ("filesystem", "filesystem_options"):
        if name in options.secrets_dropped:
            hint = "use async_save with threads, or options that the other process finds in its environment"
            raise Unsupported(f"{name}= is not pickled into another process", location.url, hint)
    elsewhere = os.environ.get("AZURE_STORAGE_CONNECTION_STRING")
    if "connection_string" in options.secrets_dropped and location.dialect == "azure" and not elsewhere:
        hint = "set AZURE_STORAGE_CONNECTION_STRING: secrets are not pickled into another process"
        raise MissingCredentials("the connection string did not travel", location.url, hint)


def engine_for(location: Location, options: StoreOptions) -> Engine:
    """Which engine serves `location`: what the URL or the options say, else the default of its dialect.

    Raises:
        InvalidOption: URL and options say different things.
        Unsupported: the native engine does not do this scheme.
    """
    asked: Engine | None = "fsspec" if options.filesystem is not None else options.engine
    if location.engine and asked and location.engine != asked:
        raise InvalidOption(f"the URL asks for the engine {location.engine!r}, engine= for {asked!r}", location.url)
    engine = location.engine or asked or DEFAULT_ENGINES.get(location.dialect, "fsspec")
    if engine == "native" and location.dialect not in NATIVE:
        raise Unsupported(f"the native engine does not do {location.scheme}://", location.url, "leave out engine=")
    return engine


def _open_cloud(location: Location, options: StoreOptions) -> ObjectStore:
    with translated("open", location.url):
        if location.dialect == "azure":
            from ckpt_cloud.stores.azure import open_azure

            return open_azure(location, options)
        if location.dialect == "gcs":
            from ckpt_cloud.stores.gcs import open_gcs

            return open_gcs(location, options)
        from ckpt_cloud.stores.s3 import open_s3

        return open_s3(location, options)


def _open_memory(location: Location) -> ObjectStore:
    from obstore.store import MemoryStore as ObstoreMemory

    from ckpt_cloud.stores.memory import MemoryStore
    from ckpt_cloud.stores.native import Clients

    raw = _memory.setdefault(location.bucket, ObstoreMemory())
    return MemoryStore(Clients.same(raw), location.path, location.url)


def _open_local(location: Location) -> ObjectStore:
    from obstore.store import LocalStore as ObstoreLocal

    from ckpt_cloud.stores.local import LocalStore

    return LocalStore(ObstoreLocal(), Path(location.path), location.url)
