"""Copies between a GPU and pinned memory, on streams of their own, beside what the training computes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

_streams = threading.local()
"""By device, one stream for each thread that copies."""


def in_use() -> bool:
    """Whether this process has touched a GPU; asking does not."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def settle() -> None:
    """Waits for what the calling thread has under way on its GPU: it made, or will overwrite, what is copied next."""
    if in_use():
        torch.cuda.current_stream().synchronize()


@contextmanager
def beside(tensor: torch.Tensor) -> Iterator[bool]:
    """Copies from or to `tensor` inside run on this thread's own stream and are done at the end.

    Yields:
        Whether they may be told not to block; False for a tensor on the CPU, for which nothing is done here.
    """
    if not tensor.is_cuda:
        yield False
        return
    stream = _stream(tensor.device)
    with torch.cuda.stream(stream):
        yield True
    stream.synchronize()


def pinned_memory(size_bytes: int) -> np.ndarray:
    """Page-locked memory, to and from which a GPU copies by itself."""
    memory: np.ndarray = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True).numpy()
    return memory


def _stream(device: torch.device) -> torch.cuda.Stream:
    known: dict[torch.device, torch.cuda.Stream] = _streams.__dict__.setdefault("by_device", {})
    if device not in known:
        known[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return known[device]
