"""Python's cyclic garbage collector, out of the way while many small objects are made that hold no cycles."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused() -> Iterator[None]:
    """No collection of cycles meanwhile; for planning, which waits for nobody.

    Every so many new objects the collector looks at all there are, which with torch loaded takes a tenth of a second:
    more than to plan a checkpoint of thousands of tensors.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
