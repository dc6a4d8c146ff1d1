"""DCP's own planning alone: a writer and a reader that move nothing."""

from __future__ import annotations

from typing import Any

from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from bench_dcp.meter import Meter
from bench_dcp.states import STATES, size_bytes


def run(direction: str, state: str, gib: float) -> dict[str, float]:
    """Figures of a save or load to nowhere."""
    dcp.save(STATES["tiny"](), storage_writer=Nowhere())
    values, nowhere = STATES[state](gib), Nowhere()
    meter = Meter()
    if direction == "save":
        with meter:
            dcp.save(values, storage_writer=nowhere)
    else:
        dcp.save(values, storage_writer=nowhere)
        with meter:
            dcp.load(values, storage_reader=Nothing(nowhere.metadata))
    return {**meter.figures, "bytes": size_bytes(values)}


class Nowhere(StorageWriter):
    """Keeps the metadata and throws the rest away."""

    metadata: Metadata

    def reset(self, checkpoint_id: Any = None) -> None: ...

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None: ...

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        done: Future[list[WriteResult]] = Future()
        done.set_result([WriteResult(item.index, 0, None) for item in plan.items])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        self.metadata = metadata

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


class Nothing(StorageReader):
    """Has the metadata, reads nothing."""

    def __init__(self, metadata: Metadata) -> None:
        self.metadata = metadata

    def reset(self, checkpoint_id: Any = None) -> None: ...

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None: ...

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True
