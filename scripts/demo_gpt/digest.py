"""SHA-256 of every value in a state dict, the same on any number of ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor


def digests(state: Mapping[str, Any]) -> dict[str, str]:
    """The digest of every tensor and plain value in `state` by its dotted name.

    A collective: sharded tensors are gathered, one at a time.
    """
    return {name: _digest(value) for name, value in _leaves("", state)}


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        pairs: list[tuple[Any, Any]] = sorted(value.items())
    elif isinstance(value, list | tuple):
        pairs = list(enumerate(value))
    else:
        yield name, value
        return
    for key, inner in pairs:
        yield from _leaves(f"{name}.{key}" if name else str(key), inner)


def _digest(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return hashlib.sha256(f"{type(value).__name__} {value!r}".encode()).hexdigest()
    full = value.full_tensor() if isinstance(value, DTensor) else value
    full = full.detach().cpu().contiguous()
    summed = hashlib.sha256(f"{full.dtype} {tuple(full.shape)}\n".encode())
    summed.update(full.reshape(-1).view(torch.uint8).numpy().data)
    return summed.hexdigest()
