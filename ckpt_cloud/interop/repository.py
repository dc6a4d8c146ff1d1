"""A Hugging Face repository that is there already: refused, or replaced; it stays until the new one is whole.

claim   is one there? ─► refuse, or note its files
begin   only if several new files have names of old ones: no index any more
end     index, or the single file, is the new one ─► old files go
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection

from ckpt_cloud import bridge
from ckpt_cloud.errors import CheckpointExists, CkptCloudError, NotFound, PermissionDenied
from ckpt_cloud.interop.safetensors_files import INDEX_KEY, SINGLE_KEY, read_index
from ckpt_cloud.stores import ObjectStore

_FILE = re.compile(r"(shard-\d{5}-)?model(-\d{5}-of-\d{5})?\.safetensors")


async def is_there(store: ObjectStore, key: str) -> bool:
    """Whether the store has an object `key`."""
    try:
        await store.head(key)
    except NotFound:
        return False
    return True


class Repository:
    """The repository right under a store's URL, whose files are to be written."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        # Set by `claim`, and emptied as they go.
        self.old: set[str] = set()

    def claim(self, *, overwrite: bool) -> None:
        """Looks whether one is there.

        Raises:
            CheckpointExists: one is, and `overwrite` is off.
        """
        self.old = bridge.run(self._find())
        if self.old and not overwrite:
            name = next((key for key in (INDEX_KEY, SINGLE_KEY) if key in self.old), min(self.old))
            hint = "choose another URL, or pass overwrite=True (--overwrite)"
            raise CheckpointExists(f"{name} is already there", self._store.url, hint)

    def begin(self, new: Collection[str]) -> None:
        """Makes the old one invisible before files of it are replaced one by one; a single file is replaced at once."""
        if len(new) > 1 and not self.old.isdisjoint(new):
            self._delete({INDEX_KEY, SINGLE_KEY} & self.old)

    def clear(self) -> None:
        """Deletes the old one, index first."""
        self._delete({INDEX_KEY} & self.old)
        self._delete(set(self.old))

    def end(self, new: Collection[str]) -> None:
        """Deletes what is left of the old one beside `new`, as far as the store lets it."""
        with contextlib.suppress(CkptCloudError):
            self._delete({INDEX_KEY} & self.old - set(new))
            self._delete(self.old - set(new))

    def _delete(self, keys: set[str]) -> None:
        if keys:
            bridge.run(self._store.delete(sorted(keys)))
            self.old -= keys

    async def _find(self) -> set[str]:
        found = {key for key in (INDEX_KEY, SINGLE_KEY) if await is_there(self._store, key)}
        with contextlib.suppress(PermissionDenied):
            # Whoever may only write cannot list; then these two are all that is known.
            found |= {info.key async for info in self._store.list() if _FILE.fullmatch(info.key)}
        if INDEX_KEY in found:
            with contextlib.suppress(CkptCloudError):
                # One that cannot be read names no files.
                found |= set((await read_index(self._store, INDEX_KEY)).values())
        return found
