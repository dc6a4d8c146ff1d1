"""When to save. Pure: a moment of the training in, whether to save out.

    SaveEveryNSteps(1000) | SaveEveryT(timedelta(minutes=20)) | SaveOnPreemption()

saves when any of them would.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

from ckpt_cloud.errors import InvalidOption


@dataclass(frozen=True, slots=True)
class Moment:
    """What is known after a step of the training.

    Attributes:
        step: that was done.
        asked: the step for which it was asked before, or that was restored; None at first.
        since_save_s: seconds since the last save began, or since the manager was made or a step was restored.
        preempted: the end of this process was announced, and no save has begun since.
    """

    step: int
    asked: int | None = None
    since_save_s: float = 0.0
    preempted: bool = False


class SavePolicy:
    """Says when to save; `a | b` saves when either would.

    Attributes:
        asks_ranks: the answer takes what only one rank knows, a clock or a signal, so that ranks must agree first.
    """

    __slots__ = ()

    @property
    def asks_ranks(self) -> bool:
        """Whether ranks may see it differently."""
        return False

    def due(self, moment: Moment) -> bool:
        """Whether to save now."""
        del moment
        return False

    def __or__(self, other: SavePolicy) -> AnySave:
        return AnySave((self, other))


@dataclass(frozen=True, slots=True)
class AnySave(SavePolicy):
    """Saves when any of `policies` would."""

    policies: tuple[SavePolicy, ...]

    @property
    def asks_ranks(self) -> bool:
        """Whether ranks may see it differently."""
        return any(policy.asks_ranks for policy in self.policies)

    def due(self, moment: Moment) -> bool:
        """Whether to save now."""
        return any(policy.due(moment) for policy in self.policies)


@dataclass(frozen=True, slots=True)
class SaveEveryNSteps(SavePolicy):
    """Saves multiples of `n`; where the training counts past one, the first step after it."""

    n: int

    def __post_init__(self) -> None:
        if type(self.n) is not int or self.n < 1:
            raise InvalidOption(f"SaveEveryNSteps({self.n!r}): it must be an int of 1 or more")

    def due(self, moment: Moment) -> bool:
        """Whether to save now."""
        passed = moment.asked is not None and moment.step // self.n > moment.asked // self.n
        return passed or moment.step % self.n == 0


@dataclass(frozen=True, slots=True)
class SaveEveryT(SavePolicy):
    """Saves when the last save began at least `period` ago, by rank 0's clock."""

    period: timedelta

    def __post_init__(self) -> None:
        if self.period <= timedelta(0):
            raise InvalidOption(f"SaveEveryT({self.period}): it must be longer than nothing")

    @property
    def asks_ranks(self) -> bool:
        """Clocks differ."""
        return True

    def due(self, moment: Moment) -> bool:
        """Whether to save now."""
        return moment.since_save_s >= self.period.total_seconds()


@dataclass(frozen=True, slots=True)
class SaveSteps(SavePolicy):
    """Saves these steps."""

    steps: frozenset[int]

    def __init__(self, steps: Iterable[int]) -> None:
        object.__setattr__(self, "steps", frozenset(steps))

    def due(self, moment: Moment) -> bool:
        """Whether to save now."""
        return moment.step in self.steps


@dataclass(frozen=True, slots=True)
class SaveOnPreemption(SavePolicy):
    """Saves once when SIGTERM has come to any rank. The manager needs `sigterm_grace_s`."""

    @property
    def asks_ranks(self) -> bool:
        """The signal may come to one."""
        return True

    def due(self, moment: Moment) -> bool:
        """Whether to save now."""
        return moment.preempted


def waits_for_signals(policy: SavePolicy | None) -> bool:
    """Whether any part of it is `SaveOnPreemption`."""
    if isinstance(policy, AnySave):
        return any(waits_for_signals(each) for each in policy.policies)
    return isinstance(policy, SaveOnPreemption)
