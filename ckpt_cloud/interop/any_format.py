"""The reader for what is at a URL, ours or another's."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Any

from ckpt_cloud.errors import CheckpointIncomplete, CheckpointNotFound, CheckpointPerRank
from ckpt_cloud.interop.contents import Contents
from ckpt_cloud.interop.reader import ForeignReader
from ckpt_cloud.lookup import Opened
from ckpt_cloud.reader import ObjectStoreReader

AnyReader = ObjectStoreReader | ForeignReader


def reader_for(
    url: str | os.PathLike[str],
    settings: dict[str, Any],
    foreign: dict[str, Any],
    demands: dict[str, Any],
    *,
    own: dict[str, Any],
    keys: Collection[str] | None = None,
) -> AnyReader:
    """The reader that can read what is at `url`; it has opened it already.

    Args:
        settings: arguments of either reader.
        foreign: further ones of `ForeignReader`.
        demands: further ones of `ObjectStoreReader`; where any is given, no other format will do.
        own: further ones of `ObjectStoreReader`, which do not matter to other formats.
        keys: of all that will be asked for, if that is known.

    Raises:
        CheckpointNotFound, ...: as `find_any`.
    """
    ours = ObjectStoreReader(url, extensions=foreign.get("extensions"), **settings, **demands, **own)
    if any(value is not None for value in demands.values()):
        if keys is not None:
            ours.adopt(ours.open(keys))
        return ours
    other = ForeignReader(url, **settings, **foreign)
    found = find_any(ours, other, keys)
    return adopted(ours, other, found)


def find_any(ours: ObjectStoreReader, other: ForeignReader, keys: Collection[str] | None = None) -> Opened | Contents:
    """What is at the readers' URL: a checkpoint of ours, if there is one.

    Raises:
        CheckpointNotFound: neither; CheckpointDeleted, CheckpointIncomplete: ours, but not to be loaded.
        As both readers' `open`.
    """
    try:
        return ours.open(keys)
    except CheckpointNotFound as error:
        if type(error) not in (CheckpointNotFound, CheckpointIncomplete, CheckpointPerRank):
            raise
        nothing = error
    try:
        return other.open()
    except CheckpointNotFound:
        raise nothing from None


def adopted(ours: ObjectStoreReader, other: ForeignReader, found: Opened | Contents) -> AnyReader:
    """The reader that `found` is for, which will use it."""
    if isinstance(found, Opened):
        ours.adopt(found)
        return ours
    other.adopt(found)
    return other
