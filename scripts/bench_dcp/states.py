"""States to save: shaped like those of real training runs, filled with chance in about a second a gigabyte."""

from __future__ import annotations

import math
import zlib

import crc32c
import numpy as np
import torch

State = dict[str, object]

_LAYERS = 16
_KINDS = ("model", "optim.exp_avg", "optim.exp_avg_sq")


def llama(gib: float = 1.0) -> State:
    """Parameters and both Adam moments of a 16-layer model in fp32, of about `gib` GiB."""
    return {name: filled(name, shape) for name, shape in _llama_shapes(gib).items()}


def strided(gib: float = 1.0) -> State:
    """The same, with matrices that are views of their transpose, so that saving has to copy them."""
    return {name: filled(name, shape[::-1]).T for name, shape in _llama_shapes(gib).items()}


def llama_bytes(gib: float) -> int:
    """Bytes of `llama(gib)`."""
    return sum(4 * math.prod(shape) for shape in _llama_shapes(gib).values())


def _llama_shapes(gib: float) -> dict[str, tuple[int, ...]]:
    width = max(64, round((gib * (1 << 30) / (4 * 3 * (_LAYERS * 12 + 64))) ** 0.5 / 64) * 64)
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (32 * width, width), "head.weight": (32 * width, width)}
    for layer in range(_LAYERS):
        for name in ("q", "k", "v", "o"):
            shapes[f"layers.{layer}.attention.{name}.weight"] = (width, width)
        shapes[f"layers.{layer}.mlp.up.weight"] = (4 * width, width)
        shapes[f"layers.{layer}.mlp.down.weight"] = (width, 4 * width)
        shapes[f"layers.{layer}.norm.weight"] = (width,)
    return {f"{kind}.{name}": shape for kind in _KINDS for name, shape in shapes.items()}


def small(gib: float = 0.0) -> State:
    """20,000 tensors of 4 KiB and 2,000 Python scalars, whatever `gib` says."""
    del gib
    values = filled("small", (20_000, 1024))
    state: State = {f"t{i}.weight": values[i].clone() for i in range(len(values))}
    return state | {f"s{i}": float(i) for i in range(2_000)}


def tiny(gib: float = 0.0) -> State:
    """One tensor and one scalar, to wake up whatever wakes up on first use."""
    del gib
    return {"t": filled("tiny", (1024,)), "s": 1.0}


STATES = {"llama": llama, "strided": strided, "small": small, "tiny": tiny}


def filled(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor with values that depend on its name alone, so that every process makes the same."""
    generator = np.random.Generator(np.random.SFC64(zlib.crc32(name.encode())))
    array = np.empty(math.prod(shape), dtype=np.float32)
    generator.random(dtype=np.float32, out=array)
    return torch.from_numpy(array).reshape(shape)


def size_bytes(state: State) -> int:
    """Bytes of all tensors."""
    return sum(v.numel() * v.element_size() for v in state.values() if isinstance(v, torch.Tensor))


def digest(state: State) -> dict[str, object]:
    """What each value is, in few bytes: a fast load of wrong bytes is worth nothing."""
    return {name: _sum(value) if isinstance(value, torch.Tensor) else value for name, value in state.items()}


def _sum(tensor: torch.Tensor) -> int:
    return crc32c.crc32c(tensor.contiguous().numpy().data)


def wipe(state: State) -> None:
    """Zeroes all tensors and numbers in place."""
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            value.zero_()
        else:
            state[name] = type(value)()  # type: ignore[call-arg]
