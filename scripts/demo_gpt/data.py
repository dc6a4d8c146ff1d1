"""Text that is on every machine: the source of Python's own standard library."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch

CORPUS_BYTES_MAX = 4 << 20


@dataclass(frozen=True, slots=True)
class Place:
    """Which rows of every global batch are this rank's."""

    rank: int
    world_size: int

    def rows(self, total: int) -> slice:
        if total % self.world_size:
            raise ValueError(f"a batch of {total} rows does not divide over {self.world_size} ranks")
        share = total // self.world_size
        return slice(self.rank * share, (self.rank + 1) * share)


def standard_library() -> torch.Tensor:
    """The first `CORPUS_BYTES_MAX` bytes of the library's modules in the order of their names, as `uint8`."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = bytearray()
    for path in sorted(folder.glob("*.py")):
        text += path.read_bytes()
        if len(text) >= CORPUS_BYTES_MAX:
            break
    if len(text) < 1 << 16:
        raise SystemExit(f"this Python has no library source in {folder}; the demo trains on it")
    return torch.frombuffer(text[:CORPUS_BYTES_MAX], dtype=torch.uint8)


def batch(
    corpus: torch.Tensor, *, seed: int, step: int, total_rows: int, length: int, place: Place
) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's rows of the batch of `step`, and the same rows one byte later.

    The global batch is a function of `(seed, step)` alone, so that it is the same on any number of ranks and after any
    resume; nothing about the reader's position needs to be saved but the step.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(len(corpus) - length - 1, (total_rows,), generator=generator)
    spans = starts[place.rows(total_rows), None] + torch.arange(length + 1)
    text = corpus[spans].long()
    return text[:, :-1], text[:, 1:]
