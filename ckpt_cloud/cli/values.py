"""The plain bytes of a stored chunk, for commands; without torch."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

from ckpt_cloud.errors import CorruptManifest
from ckpt_cloud.format import codec
from ckpt_cloud.format.codec import Buffer, Coded
from ckpt_cloud.format.manifest import Chunk, ObjectEntry
from ckpt_cloud.stores import ObjectStore
from ckpt_cloud.transfer.decode import check_codec

_STEP = 16 << 20


def is_stream(chunk: Chunk) -> bool:
    """Whether only DCP's extensions, which need torch, can tell what is in a chunk."""
    return chunk.coded is not None and not chunk.coded.frame


async def plain_bytes(
    store: ObjectStore, objects: list[ObjectEntry], chunk: Chunk, nbytes: int, name: str
) -> AsyncIterator[Buffer]:
    """The `nbytes` of a chunk of tensor `name`, piece by piece; not of a stream.

    Raises:
        CorruptManifest: it does not undo to what the manifest says.
        Unsupported: its codec is not known here, or the library is missing.
    """
    if chunk.coded is None:
        end = chunk.start + nbytes
        for at in range(chunk.start, end, _STEP):
            yield await store.get_range(objects[chunk.object].key, at, min(end, at + _STEP))
        return
    check_codec(chunk.coded.codec, framed=True, name=name)
    fault = codec.fault(chunk.coded, nbytes)
    if fault:
        raise CorruptManifest(f"a chunk of {name!r} {fault}", store.url)
    for number, start, frames in _runs(chunk.coded, nbytes):
        data = await store.get_range(objects[number].key, start, start + sum(stored for stored, _ in frames))
        try:
            for piece in codec.undone(data, tuple(frames)):
                yield piece
        except codec.BadFrame as error:
            raise CorruptManifest(f"a chunk of {name!r} cannot be undone: {error}", store.url) from None


def _runs(coded: Coded, nbytes: int) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
    """Object, first byte in it, and frames that are read together."""
    left = iter(coded.frames(nbytes))
    for number, start, length in coded.extents:
        at, end = start, start + length
        while at < end:
            frames: list[tuple[int, int]] = []
            size = 0
            while at + size < end and size < _STEP:
                frames.append(next(left))
                size += frames[-1][0]
            yield number, at, frames
            at += size
