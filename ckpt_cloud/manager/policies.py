"""Which checkpoints to keep. Pure: committed checkpoints and the time in, steps to keep out.

    LastN(3) | EveryNSteps(1000) | BestN(2, "loss")

keeps what any of them keeps. Whatever they say, the manager keeps the newest good checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Literal

from ckpt_cloud.errors import InvalidOption

Mode = Literal["min", "max"]


@dataclass(frozen=True, slots=True)
class SavedStep:
    """A committed checkpoint.

    Attributes:
        step: of the training.
        saved_unix_s: when its save began, in seconds since 1970.
        metrics: that were saved with it.
        attempt: id of the save.
    """

    step: int
    saved_unix_s: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    attempt: str = ""


class Policy:
    """Says which checkpoints to keep; `a | b` keeps what either does."""

    __slots__ = ()

    def keep(self, saved: Sequence[SavedStep], now_unix_s: float) -> set[int]:
        """The steps to keep.

        Args:
            saved: committed checkpoints in ascending order of steps; there are no others that count.
            now_unix_s: seconds since 1970.
        """
        del saved, now_unix_s
        return set()

    def __or__(self, other: Policy) -> AnyOf:
        return AnyOf((self, other))


@dataclass(frozen=True, slots=True)
class AnyOf(Policy):
    """Keeps what any of `policies` keeps."""

    policies: tuple[Policy, ...]

    def keep(self, saved: Sequence[SavedStep], now_unix_s: float) -> set[int]:
        """The steps to keep."""
        return {step for policy in self.policies for step in policy.keep(saved, now_unix_s)}


@dataclass(frozen=True, slots=True)
class KeepAll(Policy):
    """Keeps everything."""

    def keep(self, saved: Sequence[SavedStep], now_unix_s: float) -> set[int]:
        """The steps to keep."""
        del now_unix_s
        return {each.step for each in saved}


@dataclass(frozen=True, slots=True)
class LastN(Policy):
    """Keeps the `n` checkpoints of the highest steps."""

    n: int

    def __post_init__(self) -> None:
        _at_least_one("LastN", self.n)

    def keep(self, saved: Sequence[SavedStep], now_unix_s: float) -> set[int]:
        """The steps to keep."""
        del now_unix_s
        return {each.step for each in saved[-self.n :]}


@dataclass(frozen=True, slots=True)
class EveryNSteps(Policy):
    """Keeps the steps that are multiples of `n`."""

    n: int

    def __post_init__(self) -> None:
        _at_least_one("EveryNSteps", self.n)

    def keep(self, saved: Sequence[SavedStep], now_unix_s: float) -> set[int]:
        """The steps to keep."""
        del now_unix_s
        return {each.step for each in saved if each.step % self.n == 0}


@dataclass(frozen=True, slots=True)
class EveryT(Policy):
    """Keeps the oldest checkpoint, and each that was saved at least `period` after the one kept before it."""

    period: timedelta

    def __post_init__(self) -> None:
        _positive("EveryT", self.period)

    def keep(self, saved: Sequence[SavedStep], now_unix_s: float) -> set[int]:
        """The steps to keep."""
        del now_unix_s
        kept: list[SavedStep] = []
        for each in sorted(saved, key=lambda each: (each.saved_unix_s, each.step)):
            if not kept or each.saved_unix_s - kept[-1].saved_unix_s >= self.period.total_seconds():
                kept.append(each)
        return {each.step for each in kept}


@dataclass(frozen=True, slots=True)
class BestN(Policy):
    """Keeps the `n` best by a metric; of equals the later. Those without the metric are not kept by this."""

    n: int
    metric: str
    mode: Mode = "min"

    def __post_init__(self) -> None:
        _at_least_one("BestN", self.n)
        check_mode(self.mode)

    def keep(self, saved: Sequence[SavedStep], now_unix_s: float) -> set[int]:
        """The steps to keep."""
        del now_unix_s
        return {each.step for each in ranked(saved, self.metric, self.mode)[: self.n]}


@dataclass(frozen=True, slots=True)
class Listed(Policy):
    """Keeps these steps."""

    steps: frozenset[int]

    def __init__(self, steps: Iterable[int]) -> None:
        object.__setattr__(self, "steps", frozenset(steps))

    def keep(self, saved: Sequence[SavedStep], now_unix_s: float) -> set[int]:
        """The steps to keep."""
        del now_unix_s
        return {each.step for each in saved if each.step in self.steps}


@dataclass(frozen=True, slots=True)
class NewerThan(Policy):
    """Keeps what was saved within `age` before now."""

    age: timedelta

    def __post_init__(self) -> None:
        _positive("NewerThan", self.age)

    def keep(self, saved: Sequence[SavedStep], now_unix_s: float) -> set[int]:
        """The steps to keep."""
        oldest = now_unix_s - self.age.total_seconds()
        return {each.step for each in saved if each.saved_unix_s >= oldest}


def ranked(saved: Iterable[SavedStep], metric: str, mode: Mode) -> list[SavedStep]:
    """Those that have the metric, best first; of equals the later first."""
    sign = 1 if mode == "min" else -1
    having = [each for each in saved if metric in each.metrics]
    return sorted(having, key=lambda each: (sign * each.metrics[metric], -each.step))


def doomed(
    policy: Policy, saved: Sequence[SavedStep], *, newest_good: int | None, pinned: set[int], now_unix_s: float
) -> list[SavedStep]:
    """What may be deleted, oldest first: nothing while there is no good checkpoint, and never that one.

    Args:
        saved: committed checkpoints that can be read, in ascending order of steps.
        newest_good: the newest of them that was seen to be readable just now.
        pinned: steps that are in use.
    """
    if newest_good is None:
        return []
    kept = policy.keep(saved, now_unix_s) | pinned | {newest_good}
    return [each for each in saved if each.step not in kept]


def check_mode(mode: str) -> None:
    """Refuses a mode that is neither `min` nor `max`."""
    if mode not in ("min", "max"):
        raise InvalidOption(f"mode is {mode!r}; it must be 'min' or 'max'")


def _at_least_one(name: str, n: int) -> None:
    if n < 1:
        raise InvalidOption(f"{name}({n}): at least 1 is needed", hint="to keep everything, give no policy")


def _positive(name: str, length: timedelta) -> None:
    if length <= timedelta(0):
        raise InvalidOption(f"{name}({length}): it must be longer than nothing")
