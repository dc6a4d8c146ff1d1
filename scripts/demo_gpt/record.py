"""What a job told, put in order: losses by step and saves by step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

GIB = 1 << 30


@dataclass(slots=True)
class Save:
    """One checkpoint, over all ranks."""

    step: int
    ranks: int
    blocked_s: float | None = None
    """How long rank 0 could not train."""
    sizes_bytes: list[int] = field(default_factory=list)
    seconds: float = 0.0
    """Of the slowest rank, from its first hook to its last, commit included."""

    @property
    def committed(self) -> bool:
        return len(self.sizes_bytes) == self.ranks

    @property
    def size_bytes(self) -> int:
        return sum(self.sizes_bytes)

    @property
    def gib_per_s(self) -> float:
        return self.size_bytes / GIB / self.seconds if self.seconds else 0.0


@dataclass(slots=True)
class Record:
    """One job's run: `hear` its events in turn."""

    ranks: int
    losses: dict[int, float] = field(default_factory=dict)
    saves: dict[int, Save] = field(default_factory=dict)
    restored_s: float = 0.0

    def hear(self, event: dict[str, Any]) -> None:
        match event:
            case {"kind": "step", "step": step, "loss": loss, "blocked": blocked}:
                self.losses[step] = loss
                if blocked is not None:
                    self._save(step).blocked_s = blocked
            case {"kind": "saved", "step": step, "bytes": size_bytes, "seconds": seconds}:
                save = self._save(step)
                save.sizes_bytes.append(size_bytes)
                save.seconds = max(save.seconds, seconds)
            case {"kind": "restored", "seconds": seconds}:
                self.restored_s = max(self.restored_s, seconds)

    def _save(self, step: int) -> Save:
        return self.saves.setdefault(step, Save(step, self.ranks))
