"""PyTorch Distributed Checkpoint on object stores: concurrent, verified, and atomic.

Names are loaded when they are first used, so that `import ckpt_cloud` does not pay for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ckpt_cloud.errors import CkptCloudError
from ckpt_cloud.version import VERSION as __version__

if TYPE_CHECKING:
    from ckpt_cloud.api import async_save, load, save
    from ckpt_cloud.catalog import CheckpointInfo, latest, list_checkpoints
    from ckpt_cloud.collector import Collected, Garbage, delete, gc, resolve
    from ckpt_cloud.copying import Copied, copy
    from ckpt_cloud.events import BytesMoved, PartEnded, PhaseBegan, PhaseEnded, PhaseResized, Report
    from ckpt_cloud.interop.convert import Converted, convert
    from ckpt_cloud.interop.hf_writer import HuggingFaceWriter
    from ckpt_cloud.interop.lazy import Checkpoint, TensorSlice, open  # noqa: A004 - only as ckpt_cloud.open
    from ckpt_cloud.interop.reader import ForeignReader
    from ckpt_cloud.manager.checkpoints import CheckpointManager
    from ckpt_cloud.manager.policies import (
        AnyOf,
        BestN,
        EveryNSteps,
        EveryT,
        KeepAll,
        LastN,
        Listed,
        NewerThan,
        Policy,
        SavedStep,
    )
    from ckpt_cloud.manager.save_policies import (
        AnySave,
        SaveEveryNSteps,
        SaveEveryT,
        SaveOnPreemption,
        SavePolicy,
        SaveSteps,
    )
    from ckpt_cloud.manager.settings import Finished
    from ckpt_cloud.options import CommitOptions, RetryOptions, StoreOptions, TransferOptions
    from ckpt_cloud.reader import ObjectStoreReader
    from ckpt_cloud.selection import LoadResult, SelectiveLoadPlanner
    from ckpt_cloud.stores.base import UnfinishedUpload
    from ckpt_cloud.trace import Trace
    from ckpt_cloud.uploads import abort_uploads, list_uploads
    from ckpt_cloud.verification import Fault, Verification, verify
    from ckpt_cloud.writer import ObjectStoreWriter


_HOMES = {
    "AnyOf": "manager.policies",
    "AnySave": "manager.save_policies",
    "BestN": "manager.policies",
    "BytesMoved": "events",
    "Checkpoint": "interop.lazy",
    "CheckpointInfo": "catalog",
    "CheckpointManager": "manager.checkpoints",
    "Collected": "collector",
    "CommitOptions": "options",
    "Converted": "interop.convert",
    "Copied": "copying",
    "EveryNSteps": "manager.policies",
    "EveryT": "manager.policies",
    "Fault": "verification",
    "Finished": "manager.settings",
    "ForeignReader": "interop.reader",
    "Garbage": "collector",
    "HuggingFaceWriter": "interop.hf_writer",
    "KeepAll": "manager.policies",
    "LastN": "manager.policies",
    "Listed": "manager.policies",
    "LoadResult": "selection",
    "NewerThan": "manager.policies",
    "ObjectStoreReader": "reader",
    "ObjectStoreWriter": "writer",
    "PartEnded": "events",
    "PhaseBegan": "events",
    "PhaseEnded": "events",
    "PhaseResized": "events",
    "Policy": "manager.policies",
    "Report": "events",
    "RetryOptions": "options",
    "SaveEveryNSteps": "manager.save_policies",
    "SaveEveryT": "manager.save_policies",
    "SaveOnPreemption": "manager.save_policies",
    "SavePolicy": "manager.save_policies",
    "SaveSteps": "manager.save_policies",
    "SavedStep": "manager.policies",
    "SelectiveLoadPlanner": "selection",
    "StoreOptions": "options",
    "TensorSlice": "interop.lazy",
    "Trace": "trace",
    "TransferOptions": "options",
    "UnfinishedUpload": "stores.base",
    "Verification": "verification",
    "abort_uploads": "uploads",
    "async_save": "api",
    "convert": "interop.convert",
    "copy": "copying",
    "delete": "collector",
    "gc": "collector",
    "latest": "catalog",
    "list_checkpoints": "catalog",
    "list_uploads": "uploads",
    "load": "api",
    "open": "interop.lazy",
    "resolve": "collector",
    "save": "api",
    "verify": "verification",
}

__all__ = [
    "AnyOf",
    "AnySave",
    "BestN",
    "BytesMoved",
    "Checkpoint",
    "CheckpointInfo",
    "CheckpointManager",
    "CkptCloudError",
    "Collected",
    "CommitOptions",
    "Converted",
    "Copied",
    "EveryNSteps",
    "EveryT",
    "Fault",
    "Finished",
    "ForeignReader",
    "Garbage",
    "HuggingFaceWriter",
    "KeepAll",
    "LastN",
    "Listed",
    "LoadResult",
    "NewerThan",
    "ObjectStoreReader",
    "ObjectStoreWriter",
    "PartEnded",
    "PhaseBegan",
    "PhaseEnded",
    "PhaseResized",
    "Policy",
    "Report",
    "RetryOptions",
    "SaveEveryNSteps",
    "SaveEveryT",
    "SaveOnPreemption",
    "SavePolicy",
    "SaveSteps",
    "SavedStep",
    "SelectiveLoadPlanner",
    "StoreOptions",
    "TensorSlice",
    "Trace",
    "TransferOptions",
    "UnfinishedUpload",
    "Verification",
    "__version__",
    "abort_uploads",
    "async_save",
    "convert",
    "copy",
    "delete",
    "gc",
    "latest",
    "list_checkpoints",
    "list_uploads",
    "load",
    "open",
    "resolve",
    "save",
    "verify",
]


CkptCloudError.__module__ = __name__


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    # Tracebacks and docs name the place that is promised, not the room behind it.
    value.__module__ = __name__
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
