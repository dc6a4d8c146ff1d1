"""One load of a manager: the selected part of a state, from one checkpoint."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch.distributed as dist

from ckpt_cloud import api
from ckpt_cloud.events import Report
from ckpt_cloud.manager.janitor import Janitor
from ckpt_cloud.manager.ranks import Ranks
from ckpt_cloud.manager.selection import Keys, StateDict, put_back
from ckpt_cloud.manager.settings import Finished, Plugs
from ckpt_cloud.manager.traces import Traces
from ckpt_cloud.stores import Location


@dataclass(frozen=True, slots=True)
class Loading:
    """Loads for one manager; collective."""

    plugs: Plugs
    ranks: Ranks
    janitor: Janitor
    traces: Traces
    group: dist.ProcessGroup | None

    def load(self, state: StateDict, location: Location, step: int | None, keys: Keys, *, cast: bool) -> Report:
        """Loads what `keys` select, in place; a step is kept from being deleted meanwhile."""
        began = time.perf_counter()
        selected = keys.select(state)
        trace = self.traces.new()
        reader = self.plugs.reader(location, trace, cast=cast)
        if step is not None:
            self.janitor.pin(step, on=True)
        try:
            api.load(selected, storage_reader=reader, process_group=self.group, no_dist=self.ranks.alone)
        finally:
            if step is not None:
                self.janitor.pin(step, on=False)
        put_back(state, selected)
        report = reader.report
        report.blocked_s = time.perf_counter() - began
        self.plugs.tell(Finished("load", step, location.url, self.ranks.rank, report))
        self.traces.write(f"load-{'initial' if step is None else step}", trace)
        return report
