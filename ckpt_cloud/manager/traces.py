"""One trace file for all ranks of each save and load."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ckpt_cloud.manager.ranks import Ranks
from ckpt_cloud.trace import Trace, write_trace


@dataclass(frozen=True, slots=True)
class Traces:
    """Files in a directory; nothing at all without one."""

    directory: Path | None
    ranks: Ranks

    def new(self) -> Trace | None:
        """For one save or load."""
        return None if self.directory is None else Trace()

    def write(self, name: str, trace: Trace | None) -> None:
        """Gathers what all ranks saw; rank 0 writes it. Collective."""
        if self.directory is None or trace is None:
            return
        events = [event for each in self.ranks.gather(trace.events) for event in each]
        if self.ranks.is_first:
            write_trace(self.directory / f"{name}.json", events)
