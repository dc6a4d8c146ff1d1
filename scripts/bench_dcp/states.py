"""States to save: shaped like those of real training runs."""

from __future__ import annotations

import torch


def llama(gib: float = 1.0) -> dict[str, torch.Tensor]:
    """Parameters and both Adam moments of a 16-layer model in fp32, scaled to `gib` GiB."""
    width = max(64, int((gib * (1 << 30) / (4 * 3 * (16 * 12 + 64))) ** 0.5) // 64 * 64)
    shapes = {"embed.weight": (32 * width, width), "head.weight": (32 * width, width)}
    for layer in range(16):
        for name in ("q", "k", "v", "o"):
            shapes[f"layers.{layer}.attention.{name}.weight"] = (width, width)
        shapes[f"layers.{layer}.mlp.up.weight"] = (4 * width, width)
        shapes[f"layers.{layer}.mlp.down.weight"] = (width, 4 * width)
        shapes[f"layers.{layer}.norm.weight"] = (width,)
    kinds = ("model", "optim.exp_avg", "optim.exp_avg_sq")
    return {f"{kind}.{name}": torch.randn(shape) for kind in kinds for name, shape in shapes.items()}


def small() -> dict[str, object]:
    """20,000 tensors of 4 KiB and 2,000 Python scalars."""
    state: dict[str, object] = {f"t{i}.weight": torch.randn(1024) for i in range(20_000)}
    return state | {f"s{i}": float(i) for i in range(2_000)}


STATES = {"llama": llama, "small": small}
