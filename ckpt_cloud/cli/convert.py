"""`ckpt-cloud convert`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import msgspec
import torch
from rich.filesize import decimal

from ckpt_cloud.cli.ending import interruptible
from ckpt_cloud.cli.keys import Given
from ckpt_cloud.cli.output import note
from ckpt_cloud.errors import InvalidOption
from ckpt_cloud.interop.convert import Format, convert

_SHOWN = 10


@dataclass(frozen=True, slots=True)
class How:
    """Options of a conversion."""

    to: str
    overwrite: bool
    max_shard_bytes: int
    dequantize: str
    block_size: int
    trust: bool
    keys: Given


def run(source: str, destination: str, how: How, *, as_json: bool) -> None:
    """Converts, and prints what was done; what was left out goes to standard error."""
    with interruptible(f"{destination} is not there, or unfinished; run it again with --overwrite"):
        done = convert(
            source,
            destination,
            to=cast("Format", how.to),
            overwrite=how.overwrite,
            max_shard_bytes=how.max_shard_bytes,
            dequantize=_dtype(how.dequantize),
            block_size=how.block_size,
            trust=how.trust,
            source_encryption_key=how.keys.source,
            encryption_key=how.keys.target,
            decrypt=how.keys.decrypt,
            **how.keys.demands,
        )
    if done.left_out:
        more = f" and {len(done.left_out) - _SHOWN} more" if len(done.left_out) > _SHOWN else ""
        named = ", ".join(done.left_out[:_SHOWN])
        note(f"left out, since {how.to} holds nothing but tensors: {named}{more}")
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(done)).decode())
        return
    what = f"{done.tensors} tensor(s) and {done.items} item(s)"
    size = f"{decimal(done.bytes_read)} read, {decimal(done.bytes_written)} written"
    if done.bytes_copied:
        size += f", {decimal(done.bytes_copied)} copied by the store"
    print(f"{done.source_format} to {how.to}: {what}, {size}, {done.objects} object(s), {done.seconds:.1f} s")


def _dtype(name: str) -> torch.dtype | None:
    if not name:
        return None
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise InvalidOption(f"dequantize is {name!r}", hint="give bfloat16, float16 or float32")
    return found
