"""Which format is at a URL, by names and first bytes."""

from __future__ import annotations

from dataclasses import replace

from ckpt_cloud.errors import CheckpointNotFound, NotFound, PermissionDenied, RequestRefused, Unsupported
from ckpt_cloud.interop.contents import Contents
from ckpt_cloud.interop.dcp_files import metadata_key, open_dcp
from ckpt_cloud.interop.safetensors_files import (
    INDEX_KEY,
    INDEX_SUFFIX,
    SINGLE_KEY,
    SUFFIX,
    open_indexed,
    open_safetensors,
)
from ckpt_cloud.interop.torch_files import MAGIC, open_torch
from ckpt_cloud.options import StoreOptions
from ckpt_cloud.stores import Location, ObjectInfo, ObjectStore, open_store


async def find(location: Location, options: StoreOptions, *, rank: int | None = None) -> Contents | None:
    """What is at `location`, or None if it is of no format that is known.

    Args:
        rank: look for DCP metadata of this rank alone.
    """
    store = open_store(location, options, first_contact=True)
    if rank is not None:
        return await open_dcp(store, rank=rank) if await _there(store, metadata_key(rank)) else None
    if location.path.endswith((SUFFIX, INDEX_SUFFIX)):
        return await _file(location, options)
    if await _there(store, metadata_key()):
        return await open_dcp(store)
    if await _there(store, INDEX_KEY):
        return await open_indexed(store, INDEX_KEY, store.url)
    return await _file(location, options) or await _directory(store)


async def _directory(store: ObjectStore) -> Contents | None:
    """Safetensors files right under the store's URL; by their index, whatever its name, if there is one.

    Without an index `model.safetensors` is all of the model, as for Hugging Face's libraries; files beside it are
    variants of it, or something else.
    """
    infos = [info async for info in store.list() if "/" not in info.key]
    indexes = [info.key for info in infos if info.key.endswith(INDEX_SUFFIX)]
    if len(indexes) == 1:
        return await open_indexed(store, indexes[0], store.url)
    if len(indexes) > 1:
        hint = f"give the URL of one of them: {', '.join(sorted(indexes)[:5])}"
        raise Unsupported(f"there are {len(indexes)} indexes of safetensors files here", store.url, hint)
    single = [info for info in infos if info.key == SINGLE_KEY]
    files = single or sorted((info for info in infos if info.key.endswith(SUFFIX)), key=lambda info: info.key)
    return await open_safetensors(store, files, store.url) if files else None


async def _file(location: Location, options: StoreOptions) -> Contents | None:
    folder, _, name = location.path.rpartition("/")
    if not name or (location.scheme == "file" and not folder):
        return None
    store = open_store(replace(location, path=folder), options, first_contact=True)
    info = await _there(store, name)
    if info is None:
        if location.path.endswith((SUFFIX, INDEX_SUFFIX)):
            raise CheckpointNotFound("no such file", location.url)
        return None
    if name.endswith(INDEX_SUFFIX):
        return await open_indexed(store, name, location.url)
    first = bytes(await store.get_range(name, 0, min(4, info.size), info.version)) if info.size else b""
    if first == MAGIC:
        return await open_torch(store, info, location.url)
    if first[:2] == b"\x80\x02" and not name.endswith(SUFFIX):
        hint = "torch.load it and torch.save it again: the format of before torch 1.6 cannot be read by ranges"
        raise Unsupported("a bare pickle, or a torch.save file of before torch 1.6", location.url, hint)
    return await open_safetensors(store, [info], location.url)


async def _there(store: ObjectStore, key: str) -> ObjectInfo | None:
    try:
        return await store.head(key)
    except (NotFound, RequestRefused):
        return None
    except PermissionDenied:
        # S3 answers so for what is not there when listing is not allowed; a later request tells.
        return None
