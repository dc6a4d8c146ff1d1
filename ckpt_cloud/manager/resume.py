"""Which step to go on from: the newest that opens, and the one before when it turns out to be damaged."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

from ckpt_cloud.errors import CheckpointNotFound, CkptCloudError, CorruptManifest, Damaged
from ckpt_cloud.manager.known import KnownSteps
from ckpt_cloud.manager.ranks import Ranks

log = logging.getLogger(__name__)

Skipped = tuple[int, str]


class Resume:
    """Looks for a step on rank 0 and has all ranks load it. Every method is collective."""

    def __init__(self, known: KnownSteps, ranks: Ranks) -> None:
        self._known = known
        self._ranks = ranks
        # Anew with each search: steps that were passed over, with the reason.
        self.skipped: list[Skipped] = []

    def newest(self) -> int | None:
        """The highest step that opens, or None."""
        found, self.skipped = self._ranks.decide(lambda: self._search(None))
        return found

    def load_newest(self, load: Callable[[int], None], *, fallback: bool) -> int | None:
        """Has `load` load the highest step that opens; and lower ones if what it holds is damaged.

        Returns:
            The step; None where no save ever ended.

        Raises:
            Damaged: there are checkpoints and none can be loaded, so nobody begins anew unnoticed.
        """
        self.skipped, below = [], None
        damage: CkptCloudError | None = None
        while True:
            step, skipped = self._ranks.decide(partial(self._search, below))
            self.skipped += skipped
            if step is None:
                break
            try:
                load(step)
            except (Damaged, CheckpointNotFound) as error:
                if not fallback:
                    raise
                log.warning("step %d could not be loaded; going back to the one before: %s", step, error)
                self.skipped.append((step, str(error)))
                damage, below = error, step
            else:
                return step
        self._refuse_to_start_over(damage)
        return None

    def _search(self, below: int | None) -> tuple[int | None, list[Skipped]]:
        skipped: list[Skipped] = []
        for step, problem in self._known.newest_first(below):
            if problem is None:
                return step, skipped
            log.warning("step %d is passed over: %s", step, problem)
            if problem.kind != "checkpoint-incomplete":
                skipped.append((step, str(problem)))
        return None, skipped

    def _refuse_to_start_over(self, damage: CkptCloudError | None) -> None:
        if damage is not None:
            raise damage
        if self.skipped:
            said = "; ".join(f"step {step}: {why.splitlines()[0]}" for step, why in self.skipped[:5])
            hint = "restore one by its step, or begin anew under another root"
            raise CorruptManifest(f"no checkpoint can be loaded: {said}", self._known.root.url, hint)
