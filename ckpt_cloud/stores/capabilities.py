"""What a store can do, found out by trying: some servers of S3's dialect ignore conditions silently."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckpt_cloud.errors import AlreadyExists, CkptCloudError, PreconditionFailed, RequestRefused, Unsupported
from ckpt_cloud.format.layout import DATA_PREFIX, PROBE, mint_id
from ckpt_cloud.stores.base import CREATE, Condition, Replace

if TYPE_CHECKING:
    from ckpt_cloud.stores.base import ObjectStore

_NO_SUCH_VERSION = '"00000000000000000000000000000000"'


@dataclass(frozen=True, slots=True)
class Capabilities:
    """Which conditions a store keeps.

    Attributes:
        conditional_create: a create-only write is refused where an object is.
        conditional_replace: a write over one version is refused where another is.
    """

    conditional_create: bool
    conditional_replace: bool


ALL = Capabilities(conditional_create=True, conditional_replace=True)


_known: dict[str, Capabilities] = {}
"""By bucket and endpoint, for the life of the process."""


async def remembered(store: ObjectStore, name: str) -> Capabilities:
    """What `store` can do; probed once per process for all stores of this `name`, such as endpoint and bucket."""
    if name not in _known:
        _known[name] = await probe(store)
    return _known[name]


async def probe(store: ObjectStore) -> Capabilities:
    """Tries both conditions on a throw-away key, in four requests; the key is one that a collector would remove."""
    key = f"{DATA_PREFIX}{mint_id(time.time_ns() // 1_000_000, os.urandom(10))}/{PROBE}"
    await store.put(key, b"probe")
    try:
        create, replace = await asyncio.gather(
            _keeps(store, key, CREATE), _keeps(store, key, Replace(_NO_SUCH_VERSION))
        )
        return Capabilities(conditional_create=create, conditional_replace=replace)
    finally:
        # A writer may lack the permission to delete.
        with contextlib.suppress(CkptCloudError):
            await store.delete([key])


async def _keeps(store: ObjectStore, key: str, condition: Condition) -> bool:
    """Whether a write under a condition that does not hold is refused because of it."""
    try:
        await store.put(key, b"probe", condition)
    except (AlreadyExists, PreconditionFailed):
        return True
    except (Unsupported, RequestRefused):
        return False
    return False
