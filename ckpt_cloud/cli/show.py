"""`ckpt-cloud show`."""

from __future__ import annotations

import math

import msgspec
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from ckpt_cloud import bridge, commit
from ckpt_cloud.format import manifest as manifests
from ckpt_cloud.format.dtypes import SIZES
from ckpt_cloud.format.manifest import ItemEntry, Manifest, TensorEntry
from ckpt_cloud.options import StoreOptions
from ckpt_cloud.stores import open_store, parse_url


def run(url: str, *, as_json: bool) -> None:
    """Prints what the checkpoint at `url` holds."""
    location = parse_url(url)
    reference, data = bridge.run(commit.open_manifest(open_store(location, StoreOptions(), first_contact=True)))
    manifest = manifests.decode(data, reference, location.url)
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(_summary(location.url, manifest))).decode())
        return
    console = Console()
    console.print(location.url, highlight=False, soft_wrap=True)
    console.print(f"saved by {manifest.writer}, attempt {manifest.attempt}", highlight=False)
    table = Table("key", "dtype", "shape", "size", "shards", box=None)
    for name, tensor in manifest.tensors.items():
        shape = " × ".join(map(str, tensor.shape)) or "scalar"
        table.add_row(name, tensor.dtype, shape, decimal(_tensor_bytes(tensor)), str(len(tensor.chunks)))
    for name, item in manifest.items.items():
        table.add_row(name, "item", "", decimal(_item_bytes(item)), "")
    console.print(table)
    total = sum(entry.size for entry in manifest.objects)
    console.print(f"{len(manifest.objects)} object(s), {decimal(total)}", highlight=False)


def _summary(url: str, manifest: Manifest) -> dict[str, object]:
    return {
        "url": url,
        "attempt": manifest.attempt,
        "writer": manifest.writer,
        "tensors": {
            name: {"dtype": t.dtype, "shape": t.shape, "bytes": _tensor_bytes(t), "shards": len(t.chunks)}
            for name, t in manifest.tensors.items()
        },
        "items": {name: _item_bytes(item) for name, item in manifest.items.items()},
        "objects": [{"key": entry.key, "bytes": entry.size} for entry in manifest.objects],
    }


def _tensor_bytes(tensor: TensorEntry) -> int:
    return math.prod(tensor.shape) * SIZES.get(tensor.dtype, 1)


def _item_bytes(item: ItemEntry) -> int:
    return item.nbytes if item.inline is None else len(item.inline)
