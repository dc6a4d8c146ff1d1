"""What writers and readers share: their options, and the stores of the checkpoint that they are at."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any, Literal

from ckpt_cloud.errors import InvalidURL
from ckpt_cloud.format import codec
from ckpt_cloud.format.layout import rank_path
from ckpt_cloud.options import CommitOptions, StoreOptions, TransferOptions
from ckpt_cloud.stores import Location, ObjectStore, import_engine, open_both, parse_url


@dataclass(frozen=True, slots=True)
class Settings:
    """All options of a writer or reader, checked where they are made; pickles without secrets."""

    store: StoreOptions
    transfer: TransferOptions
    commit: CommitOptions

    @classmethod
    def of(
        cls,
        store: StoreOptions | None,
        transfer: TransferOptions | None,
        commit: CommitOptions | None,
        memory_budget: int | None,
        store_options: dict[str, Any],
        *,
        compression: Literal["zstd"] | None = None,
    ) -> Settings:
        """Defaults for what is None; single values win over whole option objects."""
        moves = transfer or TransferOptions()
        if memory_budget is not None:
            moves = replace(moves, memory_budget=memory_budget)
        if compression is not None:
            moves = replace(moves, compression=compression)
        return cls(StoreOptions.merged(store, store_options), moves, commit or CommitOptions())

    def check_codec(self) -> None:
        """For whoever is going to write.

        Raises:
            InvalidOption: the library that the compression needs is missing.
        """
        if self.transfer.compression is not None:
            codec.require(self.transfer.compression)


@dataclass(frozen=True, slots=True)
class Place:
    """Stores of one checkpoint: `control` gives up early when there is nobody, `data` is patient."""

    location: Location
    control: ObjectStore
    data: ObjectStore

    @classmethod
    def at(cls, location: Location, options: StoreOptions) -> Place:
        """Stores for `location`; nobody is asked yet."""
        return cls(location, *open_both(location, options))


def location_of(url: str | os.PathLike[str] | None) -> Location:
    """The location that was given.

    Raises:
        InvalidURL: none was.
    """
    if url is None:
        raise InvalidURL("no URL was given", hint="pass url= to the writer or reader, or checkpoint_id= to the call")
    return parse_url(url)


def prepare(url: str | os.PathLike[str] | None, options: StoreOptions) -> None:
    """Checks a URL that was given, and imports what it needs while nobody waits for a save.

    Raises:
        InvalidURL: it is none.
    """
    if url is not None:
        import_engine(location_of(url), options)


def rank_location(location: Location, rank: int) -> Location:
    """Where a rank keeps its own checkpoint when ranks do not coordinate (`use_collectives=False`)."""
    return location.child(rank_path(rank))
