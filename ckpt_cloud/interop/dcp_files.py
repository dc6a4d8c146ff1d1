"""Checkpoints that DCP's own writers made: `.metadata` and `.distcp` files, or whatever files it names."""

from __future__ import annotations

import math

import torch

from ckpt_cloud.errors import CorruptFile, MissingObject, NotFound
from ckpt_cloud.interop.contents import Box, Contents, Encoding, File, Item, Tensor, check_cover, checked_box
from ckpt_cloud.interop.dcp_metadata import ParsedMetadata, Stored
from ckpt_cloud.interop.pickle_walk import MAX_BYTES
from ckpt_cloud.planning.slices import Ints
from ckpt_cloud.stores import ObjectInfo, ObjectStore

METADATA_KEY = ".metadata"


def metadata_key(rank: int | None = None) -> str:
    """Key of the metadata; with `rank`, of the rank's own, which `use_collectives=False` writes."""
    return METADATA_KEY if rank is None else f"__{rank}{METADATA_KEY}"


async def open_dcp(store: ObjectStore, *, rank: int | None = None) -> Contents:
    """What DCP's metadata under the store's URL say, held against the files that are there.

    Raises:
        NotFound: there are none.
        UntrustedItem: the metadata would run code.
        CorruptFile, MissingObject: they contradict themselves or the files.
    """
    key = metadata_key(rank)
    data, _ = await store.get(key, limit=MAX_BYTES)
    parsed = ParsedMetadata(data, f"{store.url}/{key}")
    return await _Opening(store, parsed).contents(own=rank is not None)


class _Opening:
    def __init__(self, store: ObjectStore, parsed: ParsedMetadata) -> None:
        self._store = store
        self._parsed = parsed
        self._numbers: dict[str, int] = {}
        self._files: list[File] = []

    async def contents(self, *, own: bool) -> Contents:
        await self._find_files()
        tensors = {fqn: self._tensor(fqn, *told, own=own) for fqn, told in self._parsed.tensors.items()}
        items = {fqn: self._item(fqn) for fqn in self._parsed.items}
        url = self._store.url
        return Contents(url, "dcp", url, self._files, tensors, items, self._parsed.paths, own)

    async def _find_files(self) -> None:
        wanted = {stored.path: fqn for (fqn, _), stored in self._parsed.storage.items()}
        if not wanted:
            return
        found = {info.key: info async for info in self._store.list() if info.key in wanted}
        for path, fqn in wanted.items():
            # Not every store lists names that begin with a dot, or an underscore.
            info = found.get(path) or await self._head(path, fqn)
            self._numbers[path] = len(self._files)
            self._files.append(File(path, info.size, info.version))

    async def _head(self, path: str, fqn: str) -> ObjectInfo:
        try:
            return await self._store.head(path)
        except NotFound:
            hint = "the checkpoint is incomplete: a save that died, or files that were removed"
            message = f"the metadata name {path}, which holds {fqn!r} and is not there"
            raise MissingObject(message, f"{self._store.url}/{path}", hint) from None

    def _tensor(
        self, fqn: str, dtype: torch.dtype, shape: Ints, chunks: list[tuple[Ints, Ints]], *, own: bool
    ) -> Tensor:
        boxes = []
        for offsets, sizes in chunks:
            if math.prod(sizes) == 0:
                continue
            stored = self._stored(fqn, offsets)
            box = Box(
                offsets,
                sizes,
                self._numbers[stored.path],
                stored.offset,
                stored.length,
                Encoding.RECORD,
                stored.transforms,
            )
            boxes.append(checked_box(fqn, box, shape, self._files))
        if not own:
            check_cover(fqn, shape, boxes)
        return Tensor(dtype, shape, boxes)

    def _item(self, fqn: str) -> Item:
        stored = self._stored(fqn, None)
        number = self._numbers[stored.path]
        checked_box(fqn, Box((), (), number, stored.offset, stored.length), (), self._files)
        return Item(None, number, stored.offset, stored.length, stored.transforms)

    def _stored(self, fqn: str, offsets: Ints | None) -> Stored:
        found = self._parsed.storage.get((fqn, offsets))
        if found is None:
            at = "" if offsets is None else f" at {offsets}"
            raise CorruptFile(f"the metadata do not say where {fqn!r}{at} is stored", self._store.url)
        return found
