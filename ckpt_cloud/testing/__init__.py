"""For tests of code that saves and loads checkpoints; `pip install "ckpt-cloud[testing]"`.

A pytest plug-in comes with it. The two lines:

    def test_resume(checkpoint_url, store_faults):
        store_faults.fail("put", key="COMMIT", applied=True)

`checkpoint_url` is a fresh `s3://` URL on a server inside the test process, `store_faults` a `Faults` that every store
obeys which ckpt_cloud opens during the test. Names are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ckpt_cloud.testing.faulty import Crashed, Faults, FaultyStore, Operation

__all__ = ["Crashed", "Faults", "FaultyStore", "Operation"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.faulty"), name)
    value.__module__ = __name__
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
