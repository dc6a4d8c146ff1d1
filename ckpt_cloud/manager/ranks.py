"""One rank decides, the others are told; on one process nobody is asked."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from ckpt_cloud.errors import CkptCloudError, InvalidOption, RankFailed, RankLost

T = TypeVar("T")


class Ranks:
    """The ranks that save together, with process groups of their own for talk and for saves in the background.

    Making one is collective. The groups are gloo, so that no device is needed, and two, so that what is asked while a
    save runs never meets the save's own collectives.

    Args:
        group: ranks that take part; all by default.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.alone = not (dist.is_available() and dist.is_initialized())
        self.rank = 0 if self.alone else dist.get_rank(group)
        self.world = 1 if self.alone else dist.get_world_size(group)
        self._talk: dist.ProcessGroup | None = None
        self.background: dist.ProcessGroup | None = None
        if not self.alone:
            members = None if group is None else dist.get_process_group_ranks(group)
            self._talk = dist.new_group(members, backend="gloo")
            self.background = dist.new_group(members, backend="gloo")

    @property
    def is_first(self) -> bool:
        """Whether this rank decides."""
        return self.rank == 0

    def decide(self, decision: Callable[[], T]) -> T:
        """What `decision` returned, or raised, on the first rank, on every rank. Collective.

        Raises:
            RankLost: a rank died.
            InvalidOption: `close` was called.
        """
        if self.alone:
            return decision()
        talk = self._open
        told: list[Any] = [None, None]
        if self.is_first:
            try:
                told = [decision(), None]
            except CkptCloudError as error:
                told = [None, error]
            except Exception as error:  # noqa: BLE001 - the others wait for an answer
                told = [None, RankFailed(f"the first rank failed with {type(error).__name__}: {error}")]
        with self._losing():
            dist.broadcast_object_list(told, src=self._first_global, group=talk)
        value, failure = told
        if failure is not None:
            raise failure
        answer: T = value
        return answer

    def any(self, mine: bool) -> bool:
        """Whether it holds on any rank. Collective."""
        return any(self.gather(mine))

    def gather(self, mine: T) -> list[T]:
        """What each rank gave, in order, on every rank. Collective."""
        if self.alone:
            return [mine]
        talk = self._open
        found: list[Any] = [None] * self.world
        with self._losing():
            dist.all_gather_object(found, mine, group=talk)
        return found

    def close(self) -> None:
        """Lets the groups go."""
        for group in (self._talk, self.background):
            if group is not None:
                with contextlib.suppress(Exception):
                    dist.destroy_process_group(group)
        self._talk = self.background = None

    @property
    def _open(self) -> dist.ProcessGroup:
        if self._talk is None:
            raise InvalidOption("the manager was closed", hint="make another CheckpointManager")
        return self._talk

    @property
    def _first_global(self) -> int:
        return dist.get_global_rank(self._open, 0)

    @contextlib.contextmanager
    def _losing(self) -> Any:
        try:
            yield
        except RuntimeError as failure:
            hint = "restart the job; CheckpointManager.restore finds the newest committed checkpoint"
            raise RankLost(f"a rank died or no longer answers: {failure}", hint=hint) from failure
