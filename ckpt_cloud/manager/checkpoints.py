"""`CheckpointManager`: the checkpoints of one training run, by step."""

from __future__ import annotations

import atexit
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

import torch.distributed as dist

from ckpt_cloud.encryption import EncryptionKey, Keyring
from ckpt_cloud.errors import CkptCloudError, InvalidOption, SaveInFlight
from ckpt_cloud.events import Listener, Report
from ckpt_cloud.manager.janitor import Janitor
from ckpt_cloud.manager.known import KnownSteps
from ckpt_cloud.manager.loading import Loading
from ckpt_cloud.manager.pending import Pending
from ckpt_cloud.manager.policies import Mode, Policy, check_mode
from ckpt_cloud.manager.preemption import Preemption
from ckpt_cloud.manager.ranks import Ranks
from ckpt_cloud.manager.resume import Resume
from ckpt_cloud.manager.save_policies import SavePolicy
from ckpt_cloud.manager.saving import Saving
from ckpt_cloud.manager.schedule import Schedule
from ckpt_cloud.manager.selection import Keys, StateDict
from ckpt_cloud.manager.settings import Finished, Plugs, WhenBusy, check_options, checked_step
from ckpt_cloud.manager.traces import Traces
from ckpt_cloud.options import CommitOptions, StoreOptions, TransferOptions
from ckpt_cloud.preflight import Needs, require
from ckpt_cloud.session import Settings
from ckpt_cloud.signing import Signer, SignWith, TrustedKey
from ckpt_cloud.stores import parse_url

log = logging.getLogger(__name__)

Numbers = Mapping[str, float] | None
Extra = Mapping[str, Any] | None

_CLOSE_S = 300.0
_MARGIN_S = 1.0


class CheckpointManager:
    """Saves and restores the steps of one run under `root`, and deletes what is not to be kept.

    On several ranks every method is collective but the properties and `url_of`: every rank calls it, rank 0 asks the
    store, all get the same answer or the same error. One manager at a time should save under a root.

    Args:
        root: URL under which the checkpoints lie, each as `<prefix><step>`.
        save_when: what `should_save` goes by, such as `SaveEveryNSteps(500) | SaveEveryT(timedelta(minutes=20))`.
        keep: what to keep, such as `LastN(3) | EveryNSteps(1000)`; everything by default. The newest good checkpoint
            always stays. Deleting happens in the background, and what fails is tried again after the next save.
        when_busy: what `async_save` does while an earlier one runs: `wait` for it, `skip` this one, or `refuse` with
            `SaveInFlight`.
        prefix: of the names of checkpoints.
        overwrite: let a save replace a committed step, atomically; refused otherwise.
        read_only: refuse to save or delete.
        check: before the first step, look whether credentials, permissions and the store will do.
        sigterm_grace_s: on SIGTERM, end within so many seconds: `should_stop` becomes true, and a save that is not
            done by then is aborted. Needs the main thread; earlier handlers come back with `close`.
        user_metadata: JSON values to keep in every checkpoint: tags, a git commit, the configuration.
        trace_dir: a directory in which rank 0 leaves a trace file of every save and load, for Perfetto.
        on_finished: is called on every rank with a `Finished` after each save and load, for metrics systems; from
            another thread after a save in the background.
        store, transfer, commit, memory_budget, compression, progress, verify, trust, sign, trusted_keys,
            encryption_key, encryption_key_id, require_encryption, on_event: as for `ObjectStoreWriter` and
            `ObjectStoreReader`; options of the store are also keyword arguments of their own.
        process_group: ranks that save together; all by default.

    Raises:
        MissingCredentials, PermissionDenied, BucketNotFound, Unsupported, ...: the check failed; on every rank.
        InvalidURL, InvalidOption: at once.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        save_when: SavePolicy | None = None,
        keep: Policy | None = None,
        when_busy: WhenBusy = "wait",
        prefix: str = "step-",
        overwrite: bool = False,
        read_only: bool = False,
        check: bool = True,
        sigterm_grace_s: float | None = None,
        user_metadata: Extra = None,
        trace_dir: str | os.PathLike[str] | None = None,
        on_finished: Callable[[Finished], None] | None = None,
        store: StoreOptions | None = None,
        transfer: TransferOptions | None = None,
        commit: CommitOptions | None = None,
        memory_budget: int | None = None,
        compression: Literal["zstd"] | None = None,
        progress: bool = False,
        verify: bool = True,
        trust: bool = False,
        sign: SignWith | Signer | None = None,
        trusted_keys: TrustedKey | Iterable[TrustedKey] | None = None,
        encryption_key: EncryptionKey | Keyring | None = None,
        encryption_key_id: str | None = None,
        require_encryption: bool = False,
        on_event: Listener | None = None,
        process_group: dist.ProcessGroup | None = None,
        **store_options: Any,
    ) -> None:
        keyring, signer = Keyring.of(encryption_key, encryption_key_id), Signer.of(sign)
        # Locals may be shown beside a traceback.
        del encryption_key, sign
        check_options(when_busy, prefix, keep, save_when, sigterm_grace_s)
        settings = Settings.of(store, transfer, commit, memory_budget, store_options, compression=compression)
        if not read_only:
            settings.check_codec()
        self._root = parse_url(root)
        self._when_busy, self._read_only = when_busy, read_only
        demands = (trusted_keys, keyring, require_encryption, verify)
        plugs = Plugs(settings, progress, trust, signer, *demands, on_event, on_finished)
        self._known = KnownSteps(self._root, prefix, settings.store, keyring)
        self._janitor = Janitor(self._known, None if read_only else keep, settings.store)
        self._ranks = Ranks(process_group)
        if check:
            needs = Needs(not read_only, keep is not None and not read_only, not settings.commit.allow_unsafe_commit)
            self._ranks.decide(lambda: require(self._root, settings.store, needs))
        self._resume = Resume(self._known, self._ranks)
        traces = Traces(None if trace_dir is None else Path(trace_dir), self._ranks)
        self._loading = Loading(plugs, self._ranks, self._janitor, traces, process_group)
        self._saving = Saving(plugs, self._ranks, self._janitor, traces, overwrite, dict(user_metadata or {}))
        self._preemption = None if sigterm_grace_s is None else Preemption(sigterm_grace_s, self._saving.abort)
        self._schedule = Schedule(save_when, self._ranks, self._preemption)
        # All change with every save or load: the save in the background, and figures of the last.
        self._pending: Pending | None = None
        self._report = Report()
        self._closed = False
        atexit.register(self._remind)

    def __repr__(self) -> str:
        # A traceback with locals shows one whose options were refused, too.
        return f"<CheckpointManager {self._root.url if '_root' in vars(self) else 'that was refused'}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close()
        except CkptCloudError as second:
            error.add_note(f"closing the checkpoint manager failed as well: {second}")

    @property
    def report(self) -> Report:
        """Figures of this rank's last save or load."""
        return self._report

    @property
    def skipped(self) -> list[tuple[int, str]]:
        """Steps that the last `latest` or `restore` passed over, with the reason."""
        return list(self._resume.skipped)

    @property
    def failed_deletions(self) -> dict[int, str]:
        """Steps that could not be deleted yet, with the reason; known on rank 0."""
        return self._janitor.failed

    def url_of(self, step: int) -> str:
        """URL of the checkpoint of a step, whether it is there or not."""
        return self._known.location(checked_step(step)).url

    def save(
        self,
        step: int,
        state: StateDict,
        metrics: Numbers = None,
        *,
        only: Iterable[str] = (),
        exclude: Iterable[str] = (),
        user_metadata: Extra = None,
    ) -> Report:
        """Saves `state` as `step` and returns when it is committed. Waits for a save in the background first.

        Args:
            metrics: numbers such as a loss, for `best` and `BestN`; rank 0's are kept.
            only, exclude: patterns of dotted keys: `only=("model",)` saves the model alone (docs/manager.md).
            user_metadata: added to the manager's own.

        Raises:
            CheckpointExists: the step is committed and `overwrite` is off.
            AttemptAborted: SIGTERM came and the grace period ended.
            As `ckpt_cloud.save`; and what a save in the background had failed with.
        """
        began = time.perf_counter()
        self.wait()
        pending = self._begin(step, Keys.of(only, exclude).select(state), metrics, user_metadata)
        pending.save(self._ranks, self._loading.group)
        pending.blocked_s = time.perf_counter() - began
        self._saving.landed(pending)
        self._report = self._saving.finish(pending)
        return self._report

    def async_save(
        self,
        step: int,
        state: StateDict,
        metrics: Numbers = None,
        *,
        only: Iterable[str] = (),
        exclude: Iterable[str] = (),
        user_metadata: Extra = None,
    ) -> bool:
        """Copies `state` and saves it in the background, through process groups of the manager's own.

        Args are those of `save`.

        Returns:
            True; False if it was skipped because an earlier save still runs and `when_busy` is `skip`.

        Raises:
            SaveInFlight: likewise, if it is `refuse`.
            CkptCloudError: what an earlier save in the background had failed with; nothing was begun.
        """
        began = time.perf_counter()
        if self._is_busy() and self._when_busy != "wait":
            assert self._pending is not None, "all ranks begin and end saves together"
            if self._when_busy == "skip":
                log.warning("step %d was not saved: step %d still is being saved", step, self._pending.step)
                return False
            hint = "save less often, wait() first, or make the manager with when_busy='wait' or 'skip'"
            raise SaveInFlight(f"step {self._pending.step} is still being saved", self._pending.url, hint)
        self.wait()
        pending = self._begin(step, Keys.of(only, exclude).select(state), metrics, user_metadata)
        self._pending = pending
        pending.start(self._ranks, self._saving.landed, began)
        return True

    def wait(self) -> None:
        """Waits for the save in the background, if there is one, and raises what it failed with."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        pending.result()
        self._report = self._saving.finish(pending)

    def restore(
        self,
        state: StateDict,
        step: int | None = None,
        *,
        only: Iterable[str] = (),
        exclude: Iterable[str] = (),
        cast: bool = False,
        fallback: bool = True,
        initial: str | os.PathLike[str] | None = None,
        initial_only: Iterable[str] = (),
        initial_exclude: Iterable[str] = (),
    ) -> int | None:
        """Loads a step into `state`, in place.

        Args:
            step: the newest that can be loaded by default.
            only, exclude: patterns of dotted keys; the rest of `state` stays as it is.
            cast: convert elements where dtypes differ.
            fallback: without a `step`, go on to the one before if the newest is damaged; `skipped` says which were
                passed over. If off, damage is raised.
            initial: another checkpoint's URL, to begin from when there is no step yet, such as a pretrained model.
            initial_only, initial_exclude: patterns for that load alone.

        Returns:
            The step that was loaded; None when there was none, whether `initial` was loaded or not.

        Raises:
            CheckpointNotFound: the `step` is not there.
            Damaged: nothing under the root could be loaded, though there are checkpoints.
            As `ckpt_cloud.load`.
        """
        keys = Keys.of(only, exclude)

        def load(step: int) -> None:
            self._report = self._loading.load(state, self._known.location(step), step, keys, cast=cast)
            self._schedule.restored(step)

        if step is not None:
            load(checked_step(step))
            return step
        found = self._resume.load_newest(load, fallback=fallback)
        if found is None and initial is not None:
            keys = Keys.of(initial_only, initial_exclude)
            self._report = self._loading.load(state, parse_url(initial), None, keys, cast=cast)
        return found

    def latest(self) -> int | None:
        """The highest step that is committed and whose manifest can be read, or None.

        What it passes over is logged and in `skipped`.

        Raises:
            StoreUnavailable, PermissionDenied, ...: the store cannot tell.
        """
        return self._resume.newest()

    def all_steps(self, *, exact: bool = False) -> list[int]:
        """The committed steps, ascending.

        One listing, a read of the list that the manager keeps beside the checkpoints, and a small read of each step
        that neither knows.

        Args:
            exact: read every register; else a step that another program deleted lately may still be named.
        """
        steps = self._ranks.decide(lambda: [each.step for each in self._known.refresh(exact=exact)])
        if self._ranks.is_first and not self._read_only:
            self._janitor.nudge()
        return steps

    def best(self, metric: str, mode: Mode = "min") -> int | None:
        """The committed step with the least, or for `max` the greatest, value of a metric; None if none has it.

        Of equals the later one.
        """
        check_mode(mode)
        return self._ranks.decide(lambda: self._known.best(metric, mode))

    def metrics(self, step: int) -> dict[str, float]:
        """What was saved with a step.

        Raises:
            CheckpointNotFound: it is not committed.
        """
        return self._ranks.decide(lambda: self._known.metrics(checked_step(step)))

    def should_save(self, step: int) -> bool:
        """Whether `save_when` wants `step`, which was done just now, to be saved; not if it was saved or restored last.

        Ask after every step, on every rank. Ranks talk only if the policy takes a clock or a signal.

        Raises:
            InvalidOption: there is no `save_when`.
        """
        self._check_open()
        return self._schedule.due(checked_step(step))

    def should_stop(self) -> bool:
        """Whether SIGTERM has come to any rank: save and leave the loop. Cheap enough to ask after every step."""
        return self._ranks.any(self._preemption is not None and self._preemption.requested)

    def close(self) -> None:
        """Waits for the save in the background and for deletions, and puts signal handlers back.

        After SIGTERM it waits no longer than the grace period, then aborts.

        Raises:
            CkptCloudError: what the save in the background failed with.
        """
        if self._closed:
            return
        self._closed = True
        try:
            self.wait()
        finally:
            left = self._preemption.left_s if self._preemption else None
            self._janitor.close(_CLOSE_S if left is None else max(0.0, left - _MARGIN_S))
            if self._preemption is not None:
                self._preemption.restore()
            self._ranks.close()
            atexit.unregister(self._remind)

    def _is_busy(self) -> bool:
        """Whether rank 0's save still runs; all ranks go by it."""
        return self._pending is not None and self._ranks.decide(self._pending.is_running)

    def _begin(self, step: int, state: StateDict, metrics: Numbers, user_metadata: Extra) -> Pending:
        self._check_open()
        if self._read_only:
            raise InvalidOption("this manager is read-only", self.url_of(step))
        location = self._known.location(checked_step(step))
        pending = self._saving.begin(step, location, state, metrics, user_metadata)
        self._schedule.saving(step)
        if self._preemption is not None and self._preemption.is_time_up:
            self._saving.abort()
        return pending

    def _check_open(self) -> None:
        if self._closed:
            raise InvalidOption("this manager was closed", self._root.url, "make another one")

    def _remind(self) -> None:
        """At exit: a save in the background is finished by then, but nobody heard how."""
        if self._pending is not None:
            log.warning(
                "CheckpointManager was not closed: nobody asked how the save of step %d ended", self._pending.step
            )
