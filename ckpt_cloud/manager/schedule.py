"""Whether a step is to be saved, the same on all ranks."""

from __future__ import annotations

import time
from collections.abc import Callable

from ckpt_cloud.errors import InvalidOption
from ckpt_cloud.manager.preemption import Preemption
from ckpt_cloud.manager.ranks import Ranks
from ckpt_cloud.manager.save_policies import Moment, SavePolicy


class Schedule:
    """Applies a policy to steps as they are done.

    Args:
        clock: seconds, of any origin.
    """

    def __init__(
        self,
        policy: SavePolicy | None,
        ranks: Ranks,
        preemption: Preemption | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._policy = policy
        self._ranks = ranks
        self._preemption = preemption
        self._clock = clock
        # All change as steps are asked for, saved and restored; the last two: the signal has come to any rank, and a
        # save has begun since.
        self._asked: int | None = None
        self._there: int | None = None
        self._since = clock()
        self._told = False
        self._answered = False

    def due(self, step: int) -> bool:
        """Whether to save `step`; not if it was saved or restored just now. Collective where the policy needs it."""
        if self._policy is None:
            hint = "make the manager with save_when=SaveEveryNSteps(1000), for instance"
            raise InvalidOption("nothing says when to save", hint=hint)
        since, preempted = self._clock() - self._since, self._is_preempted
        if self._policy.asks_ranks and not self._ranks.alone:
            seen = self._ranks.gather((since, preempted))
            since, preempted = seen[0][0], any(told for _, told in seen)
        self._told = self._told or preempted
        due = self._policy.due(Moment(step, self._asked, since, preempted))
        self._asked = step
        return due and step != self._there

    def saving(self, step: int) -> None:
        """A save of `step` begins."""
        self._there, self._since = step, self._clock()
        # It answers the signal on all ranks, those to which it has not come yet too.
        self._answered = self._answered or self._told or self._is_signalled

    def restored(self, step: int) -> None:
        """The training goes on after `step`."""
        self._asked = self._there = step
        self._since = self._clock()

    @property
    def _is_signalled(self) -> bool:
        return self._preemption is not None and self._preemption.requested

    @property
    def _is_preempted(self) -> bool:
        return self._is_signalled and not self._answered
