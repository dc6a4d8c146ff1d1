"""Puts stores of a test's own between ckpt_cloud and every store that it opens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ckpt_cloud.stores.base import ObjectStore

Wrap = Callable[[ObjectStore], ObjectStore]

_wraps: list[Wrap] = []
"""What is in force in this process, innermost first."""


@contextmanager
def intercepted(wrap: Wrap) -> Iterator[None]:
    """Every store that this process opens meanwhile, below any URL, is `wrap(store)` instead.

    Stores that were open before stay as they are; those that are opened meanwhile stay wrapped.
    """
    _wraps.append(wrap)
    try:
        yield
    finally:
        _wraps.remove(wrap)


def apply(store: ObjectStore) -> ObjectStore:
    """`store` in everything that is in force."""
    for wrap in tuple(_wraps):
        store = wrap(store)
    return store
