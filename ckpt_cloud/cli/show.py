"""`ckpt-cloud show`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rich.filesize import decimal
from rich.table import Column, Table
from rich.tree import Tree

from ckpt_cloud.cli.contents import Contents, item_bytes, read, shape_text, tensor_bytes
from ckpt_cloud.cli.output import console, note, print_json, utc
from ckpt_cloud.encryption import Keyring
from ckpt_cloud.errors import InvalidOption
from ckpt_cloud.format.codec import Coded
from ckpt_cloud.format.manifest import TensorEntry

_OBJECTS_SHOWN = 20

Leaf = tuple[str, int, str]
"""Name, bytes, and what is said of it."""


def run(
    url: str, keys: Keyring, *, as_json: bool, depth: int | None, objects: bool, page: Path | None, traces: list[Path]
) -> None:
    """Prints what the checkpoint at `url` holds, or writes it as a page."""
    contents = read(url, keys)
    if page is not None:
        from ckpt_cloud.cli.picture.page import write

        try:
            write(contents, page, traces)
        except OSError as error:
            raise InvalidOption(f"the page cannot be written: {error}") from None
        note(f"wrote {page}")
    elif traces:
        raise InvalidOption("--trace goes with --html")
    if page is not None and not as_json:
        return
    if as_json:
        print_json(summary(contents))
        return
    manifest = contents.manifest
    console.print(contents.location.url)
    console.print(f"saved {utc(contents.saved_unix_s)} UTC by {manifest.writer}, attempt {manifest.attempt}")
    for name, noted in (("metrics", contents.metrics), ("metadata", manifest.user_metadata)):
        if noted:
            console.print(f"{name}: {', '.join(f'{key}={value}' for key, value in noted.items())}")
    console.print(_tree(_leaves(contents), depth))
    if objects:
        console.print(_objects(contents))
    console.print(f"{len(manifest.objects)} object(s), {decimal(contents.stored_bytes)}")


def summary(contents: Contents) -> dict[str, object]:
    """For programs."""
    manifest = contents.manifest
    return {
        "url": contents.location.url,
        "attempt": manifest.attempt,
        "writer": manifest.writer,
        "saved_unix_s": contents.saved_unix_s,
        "metrics": contents.metrics,
        "user_metadata": manifest.user_metadata or {},
        "tensors": {
            name: {
                "dtype": t.dtype,
                "shape": t.shape,
                "bytes": tensor_bytes(t),
                "shards": len(t.chunks),
                **_coded(t),
            }
            for name, t in manifest.tensors.items()
        },
        "items": {name: item_bytes(item) for name, item in manifest.items.items()},
        "objects": [{"key": entry.key, "bytes": entry.size} for entry in manifest.objects],
    }


def _coded(tensor: TensorEntry) -> dict[str, object]:
    """Codecs and stored bytes of a tensor of which any chunk is coded."""
    there = [chunk.coded for chunk in tensor.chunks if chunk.coded is not None]
    codecs = sorted({"+".join(each.codec) for each in there})
    return {"codecs": codecs, "coded_bytes": sum(each.stored_bytes for each in there)} if there else {}


def _leaves(contents: Contents) -> list[Leaf]:
    manifest = contents.manifest
    leaves = []
    for name, tensor in manifest.tensors.items():
        said = f"{tensor.dtype}  {shape_text(tensor)}"
        where = len({number for chunk in tensor.chunks for number in chunk.objects})
        shards = f"  {len(tensor.chunks)} shards in {where} object(s)" if len(tensor.chunks) > 1 else ""
        leaves.append((name, tensor_bytes(tensor), said + shards + _coding([c.coded for c in tensor.chunks])))
    leaves += [(name, item_bytes(item), "item" + _coding([item.coded])) for name, item in manifest.items.items()]
    return leaves


def _coding(coded: list[Coded | None]) -> str:
    """Of chunks that are not stored as they are: by what they are coded, and in how many bytes."""
    there = [each for each in coded if each is not None]
    names = sorted({"+".join(each.codec) for each in there})
    return f"  {', '.join(names)}: {decimal(sum(each.stored_bytes for each in there))}" if there else ""


def _tree(leaves: list[Leaf], depth: int | None) -> Tree:
    tree = Tree(_row("(all)", sum(size for _, size, _ in leaves), f"{len(leaves)} entries"))
    _grow(tree, leaves, depth)
    return tree


def _grow(tree: Tree, leaves: list[Leaf], depth: int | None) -> None:
    if depth is not None and depth < 1:
        return
    groups: dict[str, list[Leaf]] = {}
    for name, size, said in leaves:
        head, _, rest = name.partition(".")
        groups.setdefault(head, []).append((rest, size, said))
    for head, below in groups.items():
        if len(below) == 1:
            rest, size, said = below[0]
            tree.add(_row(f"{head}.{rest}" if rest else head, size, said))
        else:
            branch = tree.add(_row(head, sum(size for _, size, _ in below), f"{len(below)} entries"))
            _grow(branch, below, None if depth is None else depth - 1)


def _row(name: str, size: int, said: str) -> Table:
    row = Table.grid(padding=(0, 2))
    row.add_row(name or "(itself)", decimal(size), said)
    return row


def _objects(contents: Contents) -> Table:
    table = Table(Column("object", overflow="fold"), "size", "tensors", box=None)
    held: dict[int, int] = {}
    for number in _stored_in(contents):
        held[number] = held.get(number, 0) + 1
    for number, entry in enumerate(contents.manifest.objects[:_OBJECTS_SHOWN]):
        table.add_row(entry.key, decimal(entry.size), str(held.get(number, 0)))
    if len(contents.manifest.objects) > _OBJECTS_SHOWN:
        table.add_row(f"... and {len(contents.manifest.objects) - _OBJECTS_SHOWN} more", "", "")
    return table


def _stored_in(contents: Contents) -> Iterable[int]:
    for tensor in contents.manifest.tensors.values():
        yield from {number for chunk in tensor.chunks for number in chunk.objects}
