"""What the runs amount to: the claims, each true or false, and the figures of the closing table."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from demo_gpt.plot import Curves
from demo_gpt.record import Record, Save

LOSS_TOLERANCE = 1e-3
"""Sums over 4 ranks and over 2 are added up in another order, and nothing else differs."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Everything that happened."""

    steps: int
    killed: Record
    resumed: Record
    reference: Record
    killed_at: int
    state_after_kill: str
    resumed_from: int
    digests: tuple[int, int]
    """How many are equal, of how many."""
    last_committed: bool

    @property
    def saves(self) -> list[Save]:
        """The committed ones of both runs."""
        return [save for run in (self.killed, self.resumed) for save in run.saves.values() if save.committed]

    @property
    def loss_apart(self) -> float:
        """Largest distance from the curve of the run that was never stopped."""
        runs = (self.killed.losses, self.resumed.losses)
        return max(abs(loss - self.reference.losses[step]) for run in runs for step, loss in run.items())

    def curves(self) -> Curves:
        return Curves(
            reference=self.reference.losses,
            killed=self.killed.losses,
            resumed=self.resumed.losses,
            committed=[save.step for save in self.saves],
            killed_at=self.killed_at,
            resumed_from=self.resumed_from,
            ranks=(self.killed.ranks, self.resumed.ranks),
            tolerance=LOSS_TOLERANCE,
        )

    def rows(self) -> list[tuple[str, str]]:
        blocked = [save.blocked_s for save in self.saves if save.blocked_s is not None]
        rates = [save.gib_per_s for save in self.saves]
        sizes = {f"{save.size_bytes / 1e6:.1f} MB" for save in self.saves}
        return [
            ("steps", str(self.steps)),
            ("ranks", f"{self.killed.ranks}, then {self.resumed.ranks}"),
            ("committed checkpoints", f"{len(self.saves)} (steps {', '.join(str(save.step) for save in self.saves)})"),
            ("bytes per checkpoint", ", ".join(sorted(sizes))),
            ("training blocked per save", f"{median(blocked):.2f} s median, {max(blocked):.2f} s at worst"),
            (
                f"upload while training on {os.cpu_count()} cores",
                f"{median(rates):.2f} GiB/s median, {max(rates):.2f} at best",
            ),
            ("killed at", f"step {self.killed_at}, mid-save; it stayed {self.state_after_kill}"),
            ("resumed from", f"step {self.resumed_from}, loaded in {self.resumed.restored_s:.2f} s"),
            ("digests equal", "{}/{}".format(*self.digests)),
            ("largest loss difference", f"{self.loss_apart:.1e} (allowed {LOSS_TOLERANCE:.0e})"),
        ]


def judge(outcome: Outcome) -> list[tuple[str, bool]]:
    """What the demo claims, and whether it holds."""
    equal, total = outcome.digests
    all_steps = set(range(1, outcome.steps + 1))
    seen = outcome.killed.losses.keys() | outcome.resumed.losses.keys()
    return [
        ("the killed save is not visible", outcome.state_after_kill in ("incomplete", "absent")),
        ("the job resumed from the save before it", outcome.resumed_from == _last_committed(outcome.killed)),
        ("the restored state is what was saved, bit for bit", equal == total > 0),
        ("the losses are those of a run that was never stopped", outcome.loss_apart <= LOSS_TOLERANCE),
        ("no step is missing", seen == outcome.reference.losses.keys() == all_steps),
        ("the killed step was saved again, under the same URL", _saved_again(outcome)),
        ("the last save is the latest checkpoint", outcome.last_committed),
    ]


def digests_equal(folder: Path, step: int) -> tuple[int, int]:
    """Compare what rank 0 of either job wrote down; a name that only one of them has counts as different."""
    saved, restored = (json.loads((folder / f"{name}-{step}.json").read_text()) for name in ("saved", "restored"))
    names = saved.keys() | restored.keys()
    return sum(saved.get(name) == restored.get(name) for name in names), len(names)


def _last_committed(record: Record) -> int:
    return max((save.step for save in record.saves.values() if save.committed), default=0)


def _saved_again(outcome: Outcome) -> bool:
    save = outcome.resumed.saves.get(outcome.killed_at)
    return save is not None and save.committed
