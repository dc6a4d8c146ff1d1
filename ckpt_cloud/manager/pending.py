"""One save of a manager: its writer, and its future while it runs in the background."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse

from ckpt_cloud import api
from ckpt_cloud.manager.ranks import Ranks
from ckpt_cloud.manager.selection import StateDict
from ckpt_cloud.trace import Trace
from ckpt_cloud.writer import ObjectStoreWriter


@dataclass(slots=True)
class Pending:
    """A save that was begun, or is about to be."""

    step: int
    state: StateDict
    writer: ObjectStoreWriter
    trace: Trace | None
    blocked_s: float = 0.0
    """Seconds for which beginning it held the training up."""
    _future: Future[Any] | None = None
    _told: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        """Where it goes."""
        return self.writer.checkpoint_id or ""

    def save(self, ranks: Ranks, group: dist.ProcessGroup | None) -> None:
        """To the end."""
        api.save(self.state, storage_writer=self.writer, process_group=group, no_dist=ranks.alone)

    def start(self, ranks: Ranks, landed: Callable[[Pending], None], began: float) -> None:
        """Stages the state, lets it go, and leaves the rest to the background.

        Args:
            landed: is called there when the save is committed.
            began: by `time.perf_counter`, when the training began to wait.
        """
        begun = api.async_save(
            self.state, storage_writer=self.writer, process_group=ranks.background, no_dist=ranks.alone
        )
        self.state = {}
        self.blocked_s = time.perf_counter() - began
        self._future = begun.upload_completion if isinstance(begun, AsyncSaveResponse) else begun
        self._future.add_done_callback(lambda done: self._end(done, landed))

    def is_running(self) -> bool:
        """Whether it still is under way."""
        return self._future is not None and not self._told.is_set()

    def result(self) -> None:
        """Waits for it, and raises what it failed with."""
        began = time.perf_counter()
        if self._future is not None:
            self._told.wait()
            self.blocked_s += time.perf_counter() - began
            self._future.result()

    def _end(self, done: Future[Any], landed: Callable[[Pending], None]) -> None:
        try:
            if done.exception() is None:
                landed(self)
        finally:
            self._told.set()
