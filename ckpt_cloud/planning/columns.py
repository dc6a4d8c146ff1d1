"""Cutting shards that are a part of each row, so that other shardings find what they need of them in one piece."""

from __future__ import annotations

import math

from ckpt_cloud.planning.slices import Ints

LEAST = 1 << 20
"""Bytes of a chunk that is cut off: below that, a request costs more than bytes that are read in vain."""
_LONG_ROW = 1 << 20
"""Parts of rows of as many bytes are read apart anyhow."""
_SHORT_ROW = 256
"""Bytes of a row of what is cut off: shorter ones are slow to copy."""


def column_chunks(shape: Ints, sizes: Ints, itemsize: int, *, most: int) -> list[tuple[Ints, Ints]]:
    """Offsets in a shard, and sizes, of the chunks side by side that it is stored as; the shard itself if it is one.

    A shard of whole rows is one: in row-major order any rows of it lie in one piece already. Of one that is sharded
    along an inner dimension, a part of each row lies in as many pieces as there are rows.

    Args:
        shape: of the whole tensor.
        sizes: of the shard.
        most: chunks of one shard.
    """
    dim = _cut_dim(shape, sizes, itemsize)
    if dim is None:
        return [((0,) * len(sizes), sizes)]
    row = math.prod(sizes[dim:]) * itemsize
    nbytes = math.prod(sizes) * itemsize
    count = max(1, min(most, nbytes // LEAST, row // _SHORT_ROW, sizes[dim]))
    width = -(-sizes[dim] // count)
    return [
        (
            tuple(start if d == dim else 0 for d in range(len(sizes))),
            (*sizes[:dim], min(width, sizes[dim] - start), *sizes[dim + 1 :]),
        )
        for start in range(0, sizes[dim], width)
    ]


def _cut_dim(shape: Ints, sizes: Ints, itemsize: int) -> int | None:
    """The innermost dimension along which the tensor is sharded, if its rows are many and short."""
    for dim in range(len(sizes) - 1, 0, -1):
        if sizes[dim] < shape[dim]:
            many = math.prod(sizes[:dim]) > 1
            return dim if many and math.prod(sizes[dim:]) * itemsize < _LONG_ROW else None
    return None
