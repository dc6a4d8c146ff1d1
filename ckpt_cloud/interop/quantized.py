"""Block-quantized fp8 weights of Hugging Face repositories, multiplied out while they are loaded.

`x.weight` holds fp8 elements and `x.weight_scale_inv` one scale for each block of 128 × 128 of them, as DeepSeek-V3 and
others publish it: weight = fp8 × scale.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from ckpt_cloud.errors import CorruptFile, InvalidOption
from ckpt_cloud.interop.contents import Box, Contents
from ckpt_cloud.planning.slices import Ints

SCALE_SUFFIX = "_scale_inv"
_Wanted = tuple[str, Box, Ints, Ints, torch.Tensor]


class Dequantizer:
    """Tells the planner of weights as they will be, and makes them so.

    Args:
        dtype: of the loaded weights.
        block_size: rows and columns of a block with one scale.
    """

    def __init__(self, dtype: torch.dtype, block_size: int) -> None:
        if not dtype.is_floating_point or dtype.itemsize < 2:
            raise InvalidOption(f"dequantize is {dtype}; give float32, bfloat16 or another of 16 bits or more")
        if block_size < 1:
            raise InvalidOption(f"block_size is {block_size}; it must be at least 1")
        self._dtype = dtype
        self._block = block_size
        # By weight, for the checkpoint that was opened last.
        self._scales: dict[str, str] = {}

    def adapt(self, contents: Contents, metadata: Metadata) -> None:
        """Gives weights their new type in `metadata` and takes their scales out.

        Raises:
            CorruptFile: a scale does not fit its weight.
        """
        self._scales = {}
        entries = metadata.state_dict_metadata
        for fqn, tensor in contents.tensors.items():
            scale = contents.tensors.get(fqn + SCALE_SUFFIX)
            if scale is None or tensor.dtype.itemsize != 1 or not tensor.dtype.is_floating_point:
                continue
            blocks = tuple(-(-size // self._block) for size in tensor.shape)
            if len(tensor.shape) != 2 or scale.shape != blocks or len(scale.boxes) != 1:
                message = f"{fqn!r} of shape {tensor.shape} has scales of shape {scale.shape}, not {blocks}"
                raise CorruptFile(message, contents.url, "give the block_size that it was quantized with")
            self._scales[fqn] = fqn + SCALE_SUFFIX
            entry = entries[fqn]
            assert isinstance(entry, TensorStorageMetadata), "it is a tensor"
            entry.properties.dtype = self._dtype
        for name in self._scales.values():
            del entries[name]

    def handles(self, fqn: str) -> bool:
        """Whether `fqn` is a quantized weight."""
        return fqn in self._scales

    def parts(
        self, contents: Contents, fqn: str, box: Box, place: tuple[Ints, Ints], target: torch.Tensor
    ) -> tuple[list[_Wanted], Callable[[], None]]:
        """What must be read for a part of a weight, and what makes the weight of it once it is there.

        Args:
            box: stored box of the weight.
            place: offsets and sizes of the part in it.
        """
        offsets, sizes = place
        scale = contents.tensors[self._scales[fqn]]
        start = tuple(a + b for a, b in zip(box.offsets, offsets, strict=True))
        first = tuple(at // self._block for at in start)
        count = tuple(-(-(at + size) // self._block) - f for at, size, f in zip(start, sizes, first, strict=True))
        quantized = torch.empty(sizes, dtype=contents.tensors[fqn].dtype)
        scales = torch.empty(count, dtype=scale.dtype)

        def finish() -> None:
            factors = scales.to(torch.float32)
            for dim in range(2):
                factors = self._spread(factors, dim, start[dim] - first[dim] * self._block, sizes[dim])
            target.copy_(quantized.to(torch.float32).mul_(factors).to(self._dtype))

        return [
            (fqn, box, offsets, sizes, quantized),
            (self._scales[fqn], scale.boxes[0], first, count, scales),
        ], finish

    def _spread(self, scales: torch.Tensor, dim: int, skipped: int, size: int) -> torch.Tensor:
        """Each scale over the elements of its block along `dim`."""
        return scales.repeat_interleave(self._block, dim).narrow(dim, skipped, size)
