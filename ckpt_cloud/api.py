"""`save`, `load` and `async_save`: DCP's own, with the plug-in chosen by URL and errors of ours on every rank."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from concurrent.futures import Future
from typing import Any, Literal, TypeVar

import torch.distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlanner, SavePlanner
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter

from ckpt_cloud import background, dcp_log, garbage
from ckpt_cloud.encryption import EncryptionKey, Keyring
from ckpt_cloud.errors import (
    CheckpointNotFound,
    CheckpointPerRank,
    CkptCloudError,
    CommitStateUnknown,
    InvalidOption,
    RankFailed,
    RankLost,
    StateMismatch,
)
from ckpt_cloud.interop.any_format import AnyReader, find_any
from ckpt_cloud.interop.contents import Contents
from ckpt_cloud.interop.reader import ForeignReader
from ckpt_cloud.lookup import Opened
from ckpt_cloud.metadata import rank_here
from ckpt_cloud.reader import ObjectStoreReader
from ckpt_cloud.selection import Keys, LoadResult, Rename, SelectiveLoadPlanner, misfits, mismatch
from ckpt_cloud.writer import ObjectStoreWriter

log = logging.getLogger(__name__)

StateDict = dict[str, Any]
T = TypeVar("T")


def save(
    state_dict: StateDict,
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_writer: StorageWriter | None = None,
    planner: SavePlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
    use_collectives: bool = True,
    compression: Literal["zstd"] | None = None,
    encryption_key: EncryptionKey | None = None,
    encryption_key_id: str | None = None,
) -> Metadata:
    """`torch.distributed.checkpoint.save` to an object store.

    Args are DCP's, and three more. `checkpoint_id` is the URL; without a `storage_writer` an `ObjectStoreWriter` with
    its defaults is used. Python's garbage collector comes rarely meanwhile, and DCP logs nothing unless its log has
    a handler.

    Args:
        compression, encryption_key, encryption_key_id: as for `ObjectStoreWriter`; a `storage_writer` takes them
            itself.

    Raises:
        InvalidOption: `compression` or `encryption_key` beside a `storage_writer`, which would not see it.
        CkptCloudError: on every rank, of the lowest rank that failed. Unless it is `CommitStateUnknown`, nothing was
            published and what was uploaded has been deleted as far as possible.
    """
    keyring = Keyring.of(encryption_key, encryption_key_id)
    # Locals may be shown beside a traceback.
    del encryption_key
    writer = _writer(storage_writer, compression, keyring)
    began = time.perf_counter()
    try:
        with garbage.paused(), dcp_log.muted():
            saved: Metadata = dcp.save(
                state_dict,
                checkpoint_id=checkpoint_id,
                storage_writer=writer,
                planner=planner,
                process_group=process_group,
                no_dist=no_dist,
                use_collectives=use_collectives,
            )
    except (CheckpointException, CkptCloudError) as failure:
        raise _after_failed_save(failure, writer) from failure
    except RuntimeError as failure:
        raise _lost(failure, no_dist=no_dist) from failure
    _tell("saved", writer, time.perf_counter() - began)
    return saved


def async_save(
    state_dict: StateDict,
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_writer: StorageWriter | None = None,
    planner: SavePlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    async_checkpointer_type: AsyncCheckpointerType = AsyncCheckpointerType.THREAD,
    async_stager: AsyncStager | None = None,
    no_dist: bool = False,
    use_collectives: bool = True,
    in_flight: Literal["wait", "refuse"] = "wait",
    compression: Literal["zstd"] | None = None,
    encryption_key: EncryptionKey | None = None,
    encryption_key_id: str | None = None,
) -> Future[Metadata] | AsyncSaveResponse:
    """`torch.distributed.checkpoint.async_save` to an object store.

    Args are DCP's, and four more. Give it a process group of its own, with a CPU backend: the background thread runs
    collectives beside the training's. Until its end DCP logs nothing unless its log has a handler when it begins.

    Args:
        in_flight: what becomes of a save while an earlier one of this process is still under way. There is one
            staged copy of the state at a time, so that it waits for the earlier to end, or is refused.
        compression, encryption_key, encryption_key_id: as for `save`. To another process only the path of a key or a
            function travels.

    Returns:
        A future of the metadata, or DCP's `AsyncSaveResponse` for stagers that stage in the background. Its
        `result()` raises as `save` does.

    Raises:
        SaveInFlight: an earlier save is not done, and this one may not wait. Decide alike on all ranks.
    """
    keyring = Keyring.of(encryption_key, encryption_key_id)
    # Locals may be shown beside a traceback.
    del encryption_key
    writer = _writer(storage_writer, compression, keyring)
    with background.turn(in_flight), contextlib.ExitStack() as until_done:
        until_done.enter_context(dcp_log.muted())
        response = dcp.async_save(
            state_dict,
            checkpoint_id=checkpoint_id,
            storage_writer=writer,
            planner=planner,
            process_group=process_group,
            async_checkpointer_type=async_checkpointer_type,
            async_stager=async_stager,
            no_dist=no_dist,
            use_collectives=use_collectives,
        )
        over = until_done.pop_all()
        upload = response.upload_completion if isinstance(response, AsyncSaveResponse) else response
        upload.add_done_callback(lambda _: over.close())
        settled = _settled(upload, writer, no_dist=no_dist)
        background.begun(settled)
    if isinstance(response, AsyncSaveResponse):
        return AsyncSaveResponse(response.staging_completion, settled)
    return settled


def _writer(given: StorageWriter | None, compression: Literal["zstd"] | None, keys: Keyring) -> StorageWriter:
    if given is None:
        return ObjectStoreWriter(compression=compression, encryption_key=keys)
    refused = "encryption_key" if keys else "compression" if compression is not None else ""
    if refused:
        hint = f"pass it to the writer: ObjectStoreWriter(url, {refused}=...)"
        raise InvalidOption(f"{refused}= is for save's own writer, and another was given", hint=hint)
    return given


def load(
    state_dict: StateDict,
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_reader: StorageReader | None = None,
    planner: LoadPlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
    keys: Keys | None = None,
    rename: Rename | None = None,
    strict: bool | None = None,
    encryption_key: EncryptionKey | None = None,
    verify: bool = True,
) -> LoadResult:
    """`torch.distributed.checkpoint.load` from an object store, in place.

    Args are DCP's, and five more. `checkpoint_id` is the URL; without a `storage_reader` the one for what is
    there is used, with its defaults: `ObjectStoreReader` for checkpoints of ours, `ForeignReader` for DCP's own,
    safetensors files and Hugging Face repositories, and `torch.save` files. One rank opens the checkpoint for all.
    Python's garbage collector comes rarely meanwhile.

    Args:
        keys: which keys of the state to load: a name or dotted prefix, several of them, or a predicate; all others
            stay as they are. All by default.
        rename: where the checkpoint has other names: from the state's names or dotted prefixes to the checkpoint's,
            or a function that tells the checkpoint's name.
        strict: None: a key that the checkpoint lacks is an error. True: so is one that only the checkpoint has.
            False: neither is.
        encryption_key, verify: as for `ObjectStoreReader`; with a `storage_reader` it takes them itself.

    Returns:
        Which keys of the state were not in the checkpoint, and the other way round, over all ranks. Empty when the
        `planner` is not a `SelectiveLoadPlanner`: it alone knows.

    Raises:
        InvalidOption: `keys`, `rename` or `strict` beside a `planner`, or `encryption_key` or `verify` beside a
            `storage_reader`, which would not see them.
        CkptCloudError: on every rank, of the lowest rank that failed. `StateMismatch` lists every key and shape that
            does not fit.
    """
    keyring = Keyring.of(encryption_key)
    # Locals may be shown beside a traceback.
    del encryption_key
    reader = _reader(storage_reader, keyring, verify=verify)
    began = time.perf_counter()
    if planner is None:
        planner = SelectiveLoadPlanner(keys, rename, strict)
    elif (keys, rename, strict) != (None, None, None):
        hint = "pass planner=ckpt_cloud.SelectiveLoadPlanner(keys, rename, strict), or a planner derived from it"
        raise InvalidOption("keys, rename and strict are for load's own planner, and another was given", hint=hint)
    if isinstance(reader, ObjectStoreReader | ForeignReader):
        reader.reset(checkpoint_id)
        checkpoint_id = None
        reader = _open_for_all(reader, process_group, any_format=storage_reader is None, no_dist=no_dist)
    try:
        with garbage.paused():
            dcp.load(
                state_dict,
                checkpoint_id=checkpoint_id,
                storage_reader=reader,
                planner=planner,
                process_group=process_group,
                no_dist=no_dist,
            )
    except (CheckpointException, CkptCloudError) as failure:
        raise _mismatch(planner, reader, failure) or _ours(failure) from failure
    except RuntimeError as failure:
        raise _lost(failure, no_dist=no_dist) from failure
    _tell("loaded", reader, time.perf_counter() - began)
    return planner.result if isinstance(planner, SelectiveLoadPlanner) else LoadResult()


def _reader(given: StorageReader | None, keys: Keyring, *, verify: bool) -> StorageReader:
    if given is None:
        return ObjectStoreReader(encryption_key=keys, verify=verify)
    if keys or not verify:
        hint = "pass encryption_key= and verify= to ObjectStoreReader"
        raise InvalidOption("encryption_key= and verify= are for load's own reader, and another was given", hint=hint)
    return given


def _tell(what: str, plug: StorageWriter | StorageReader, blocked_s: float | None = None) -> None:
    """Logs the figures: of the first rank for people, of all for whoever looks closer."""
    if isinstance(plug, ObjectStoreWriter | ObjectStoreReader):
        report = plug.report
        if blocked_s is not None:
            report.blocked_s = blocked_s
        level = logging.INFO if rank_here() == 0 else logging.DEBUG
        log.log(level, "%s %s: %s", what, plug.checkpoint_id, report)


def _lost(failure: RuntimeError, *, no_dist: bool) -> RuntimeError:
    """What a failed collective means; DCP wraps what a rank's own code raises, so nothing else comes out bare."""
    if no_dist or not dist.is_available() or not dist.is_initialized():
        return failure
    hint = "restart the job; ckpt_cloud.latest(root) finds the newest committed checkpoint"
    return RankLost(f"a rank died or no longer answers: {failure}", hint=hint)


def _open_for_all(reader: AnyReader, group: dist.ProcessGroup | None, *, any_format: bool, no_dist: bool) -> AnyReader:
    """The coordinator opens the checkpoint and sends what it found, or why it could not, to all ranks.

    Args:
        any_format: take another reader where the checkpoint is of another format.
    """
    alone = no_dist or not dist.is_available() or not dist.is_initialized()
    coordinator = 0 if alone or group is None else dist.get_global_rank(group, 0)
    found: list[Opened | Contents | CkptCloudError] = [CheckpointNotFound("nothing was opened")]
    if alone or dist.get_rank() == coordinator:
        found = [_try_open(reader, any_format=any_format)]
    if not alone:
        try:
            dist.broadcast_object_list(found, src=coordinator, group=group)
        except RuntimeError as failure:
            raise _lost(failure, no_dist=no_dist) from failure
    if isinstance(found[0], CkptCloudError):
        if isinstance(found[0], CheckpointPerRank):
            return reader
        raise found[0]
    if isinstance(found[0], Contents) and isinstance(reader, ObjectStoreReader):
        reader = ForeignReader(reader.checkpoint_id)
    reader.adopt(found[0])  # type: ignore[arg-type] # each reader is given what is its own
    return reader


def _try_open(reader: AnyReader, *, any_format: bool) -> Opened | Contents | CkptCloudError:
    """What is found, or why not; nothing may be raised here, since the other ranks wait for an answer."""
    try:
        if any_format and isinstance(reader, ObjectStoreReader):
            return find_any(reader, ForeignReader(reader.checkpoint_id))
        return reader.open()
    except CkptCloudError as error:
        return error
    except Exception as error:  # noqa: BLE001 - told to all ranks
        return RankFailed(f"the coordinator failed with {type(error).__name__}: {error}", reader.checkpoint_id or "")


def _settled(upload: Future[T], writer: StorageWriter, *, no_dist: bool) -> Future[T]:
    """`upload` with our errors, and with what a failed save left cleaned up before it is done."""
    settled: Future[T] = Future()
    settled.set_running_or_notify_cancel()

    def settle(done: Future[T]) -> None:
        failure = done.exception()
        if failure is None:
            _tell("saved", writer)
            settled.set_result(done.result())
        elif isinstance(failure, CheckpointException | CkptCloudError):
            error = _after_failed_save(failure, writer)
            error.__cause__ = failure
            settled.set_exception(error)
        elif isinstance(failure, RuntimeError):
            lost = _lost(failure, no_dist=no_dist)
            lost.__cause__ = failure if lost is not failure else None
            settled.set_exception(lost)
        else:
            settled.set_exception(failure)

    upload.add_done_callback(settle)
    return settled


def _after_failed_save(failure: BaseException, writer: StorageWriter) -> BaseException:
    """The error to raise. What a save left that certainly did not commit, and never will, is deleted."""
    certain = all(isinstance(e, Exception) and not isinstance(e, CommitStateUnknown) for e in _failures(failure))
    # An interrupt may have come between the commit and its answer.
    if isinstance(writer, ObjectStoreWriter) and certain:
        writer.discard()
    return _ours(failure)


def _failures(failure: BaseException) -> list[BaseException]:
    """Errors of all ranks, lowest rank first."""
    if not isinstance(failure, CheckpointException):
        return [failure]
    return [failure.failures[rank][0] for rank in sorted(failure.failures)]


def _ours(failure: BaseException) -> BaseException:
    """The error of ours among those of all ranks; an interrupt stays what it is."""
    errors = _failures(failure)
    for kind in (KeyboardInterrupt, SystemExit, CkptCloudError):
        for error in errors:
            if isinstance(error, kind):
                return error
    first = errors[0]
    hint = "the cause is the CheckpointException of all ranks, with their tracebacks"
    return RankFailed(f"{len(errors)} rank(s) failed, first with {type(first).__name__}: {first}", hint=hint)


def _mismatch(planner: LoadPlanner, reader: StorageReader, failure: BaseException) -> StateMismatch | None:
    """What does not fit between the state and the checkpoint, when DCP's planner gave up over it."""
    state, metadata = getattr(planner, "state_dict", None), getattr(planner, "metadata", None)
    if any(isinstance(error, CkptCloudError) for error in _failures(failure)) or not state or metadata is None:
        return None
    stored = metadata.state_dict_metadata
    faults = []
    if not getattr(planner, "allow_partial_load", False):
        faults += [f"{fqn} is not in the checkpoint" for fqn in state if fqn not in stored]
    faults += misfits(state, stored).values()
    return mismatch(faults, getattr(reader, "checkpoint_id", None) or "") if faults else None
