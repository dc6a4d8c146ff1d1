"""One save of a manager: begun, landed on whichever thread it ended, and finished where somebody waits for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ckpt_cloud.events import Report
from ckpt_cloud.manager.janitor import Janitor
from ckpt_cloud.manager.pending import Pending
from ckpt_cloud.manager.ranks import Ranks
from ckpt_cloud.manager.selection import StateDict
from ckpt_cloud.manager.settings import Finished, Plugs
from ckpt_cloud.manager.traces import Traces
from ckpt_cloud.stores import Location


@dataclass(slots=True)
class Saving:
    """Saves for one manager; `begin` and `finish` are collective."""

    plugs: Plugs
    ranks: Ranks
    janitor: Janitor
    traces: Traces
    overwrite: bool
    user_metadata: Mapping[str, Any]
    # Changes with every save: the one that began last.
    _active: Pending | None = field(default=None, init=False)

    def begin(
        self,
        step: int,
        location: Location,
        state: StateDict,
        metrics: Mapping[str, float] | None,
        user_metadata: Mapping[str, Any] | None,
    ) -> Pending:
        """What is to be saved, with the writer for it."""
        trace = self.traces.new()
        noted = dict(self.user_metadata) | dict(user_metadata or {})
        writer = self.plugs.writer(location, trace, overwrite=self.overwrite, metrics=metrics, user_metadata=noted)
        self._active = Pending(step, state, writer, trace)
        return self._active

    def landed(self, pending: Pending) -> None:
        """The save is committed."""
        pending.writer.report.blocked_s = pending.blocked_s
        self.plugs.tell(Finished("save", pending.step, pending.url, self.ranks.rank, pending.writer.report))
        if self.ranks.is_first:
            self.janitor.nudge(pending.step)

    def finish(self, pending: Pending) -> Report:
        """Its figures, and its trace file."""
        report = pending.writer.report
        report.blocked_s = pending.blocked_s
        self.traces.write(f"save-{pending.step}", pending.trace)
        return report

    def abort(self) -> None:
        """Gives up the save that began last, unless it is over or committing; from any thread."""
        if self._active is not None:
            self._active.writer.abort()
