"""`ckpt-cloud diff`."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import typer

from ckpt_cloud import bridge
from ckpt_cloud.cli.contents import Contents, chunk_bytes, item_bytes, read, shape_text
from ckpt_cloud.cli.ending import NOTHING
from ckpt_cloud.cli.output import console, print_json
from ckpt_cloud.cli.values import is_stream, plain_bytes
from ckpt_cloud.encryption import Keyring
from ckpt_cloud.format.manifest import Chunk, ItemEntry, TensorEntry


@dataclass(slots=True)
class Difference:
    """What two checkpoints do not have in common.

    Attributes:
        removed, added: keys of the first and of the second alone.
        changed: keys of both, with how they differ.
        uncompared: tensors whose values were not compared, since they are sharded differently, or went through stream
            transforms.
    """

    removed: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)
    changed: dict[str, str] = field(default_factory=dict)
    uncompared: list[str] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Whether nothing differs."""
        return not (self.removed or self.added or self.changed)


def run(first: str, second: str, keys: Keyring, *, values: bool, as_json: bool) -> None:
    """Prints how two checkpoints differ; ends with status 1 if they do. One may be encrypted, the other not."""
    one, other = read(first, keys), read(second, keys)
    found = compare(one, other)
    if values:
        bridge.run(_compare_values(one, other, found))
    if as_json:
        print_json(found)
    else:
        _print(found, values=values)
    if not found.is_empty:
        raise typer.Exit(NOTHING)


def compare(one: Contents, other: Contents) -> Difference:
    """Keys, shapes, dtypes and shards."""
    before, after = one.manifest, other.manifest
    names = [*before.tensors, *before.items], [*after.tensors, *after.items]
    found = Difference([n for n in names[0] if n not in set(names[1])], [n for n in names[1] if n not in set(names[0])])
    for name in names[0]:
        if name in before.tensors and name in after.tensors:
            said = _changed(before.tensors[name], after.tensors[name])
        elif name in before.items and name in after.items:
            said = _changed_item(before.items[name], after.items[name])
        else:
            said = "" if name in found.removed else "a tensor in one, an item in the other"
        if said:
            found.changed[name] = said
    return found


def _changed(before: TensorEntry, after: TensorEntry) -> str:
    said = []
    if before.dtype != after.dtype:
        said.append(f"{before.dtype} → {after.dtype}")
    if before.shape != after.shape:
        said.append(f"{shape_text(before)} → {shape_text(after)}")
    return ", ".join(said)


def _changed_item(before: ItemEntry, after: ItemEntry) -> str:
    sizes = item_bytes(before), item_bytes(after)
    equal = (before.inline, before.value) == (after.inline, after.value) and sizes[0] == sizes[1]
    return "" if equal else f"another value, {sizes[0]} bytes → {sizes[1]} bytes"


async def _compare_values(one: Contents, other: Contents, found: Difference) -> None:
    """Reads tensors of the same shape, shard by shard, in fixed memory."""
    for name, before in one.manifest.tensors.items():
        after = other.manifest.tensors.get(name)
        if after is None or name in found.changed:
            continue
        shards = [{(c.offsets, c.sizes): c for c in tensor.chunks} for tensor in (before, after)]
        if shards[0].keys() != shards[1].keys():
            found.uncompared.append(name)
            continue
        if any(is_stream(chunk) for chunks in shards for chunk in chunks.values()):
            found.uncompared.append(name)
            continue
        for box, chunk in shards[0].items():
            size = chunk_bytes(before, chunk)
            digests = [
                await _digest(contents, own, size, name) for contents, own in ((one, chunk), (other, shards[1][box]))
            ]
            if digests[0] != digests[1]:
                found.changed[name] = "values"
                break


async def _digest(contents: Contents, chunk: Chunk, size: int, name: str) -> bytes:
    digest = hashlib.blake2b()
    if size:
        async for piece in plain_bytes(contents.store, contents.manifest.objects, chunk, size, name):
            digest.update(piece)
    return digest.digest()


def _print(found: Difference, *, values: bool) -> None:
    for sign, names in (("-", found.removed), ("+", found.added)):
        for name in names:
            console.print(f"{sign} {name}")
    for name, said in found.changed.items():
        console.print(f"~ {name}: {said}")
    for name in found.uncompared:
        console.print(f"? {name}: sharded differently or transformed, so its values were not compared")
    if found.is_empty:
        what = "values" if values else "keys, shapes, dtypes and small items; --values compares tensors' bytes too"
        console.print(f"no difference in {what}")
