"""Runs the commit protocol against a store: reads and publishes `COMMIT`, reads and writes the manifest."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import tenacity
from msgspec import UNSET, structs

from ckpt_cloud import protocol
from ckpt_cloud.encryption import Keyring, Seal
from ckpt_cloud.errors import (
    AlreadyExists,
    CheckpointChanged,
    CheckpointDeleted,
    CheckpointIncomplete,
    CheckpointNotFound,
    CheckpointPerRank,
    CkptCloudError,
    CorruptCommit,
    CorruptManifest,
    Damaged,
    DecryptionFailed,
    NotFound,
    PreconditionFailed,
    SignatureError,
    StoreUnavailable,
    Throttled,
    Unsupported,
)
from ckpt_cloud.format import manifest as manifests
from ckpt_cloud.format import register as registers
from ckpt_cloud.format.layout import COMMIT_KEY, DATA_PREFIX, NO_ID, is_rank_path, join, manifest_key
from ckpt_cloud.format.manifest import Manifest
from ckpt_cloud.format.register import CODED_CHUNKS, ENCRYPTED, ManifestRef, Register
from ckpt_cloud.options import CommitOptions
from ckpt_cloud.protocol import Answer, Failed, Intent, Put, ReadBack, Seen, Step
from ckpt_cloud.stores import CREATE, Condition, ObjectStore, Replace
from ckpt_cloud.stores.reaching import HINT
from ckpt_cloud.workers import in_thread

_MANIFEST_LIMIT = 1 << 32
_REGISTER_TIMEOUT_S = 15.0
"""For one request about `COMMIT`, which is tiny: a store that needs longer does not answer."""
_UNCLEAR = (StoreUnavailable, Throttled)
_SALT_BYTES = 32
NO_KEYS = Keyring()


async def read_register(store: ObjectStore, *, under: str = "") -> Seen:
    """The register of the checkpoint at `store`, or at the path `under` below it; or that there is none.

    Raises:
        CorruptCommit, Unsupported: it cannot be understood, twice.
    """
    try:
        return await _read_register(store, join(under, COMMIT_KEY))
    except CorruptCommit:
        # Damage that happened on the way is gone the second time.
        return await _read_register(store, join(under, COMMIT_KEY))


async def _read_register(store: ObjectStore, key: str) -> Seen:
    try:
        async with asyncio.timeout(_REGISTER_TIMEOUT_S):
            data, info = await store.get(key, limit=registers.MAX_BYTES)
    except NotFound:
        return Seen(None)
    except Damaged as error:
        raise CorruptCommit(f"COMMIT is not one of ours: {error.message}", f"{store.url}/{key}") from None
    except TimeoutError:
        message = f"COMMIT could not be read within {_REGISTER_TIMEOUT_S:.0f} s"
        raise StoreUnavailable(message, f"{store.url}/{key}", HINT) from None
    return Seen(registers.decode(data, f"{store.url}/{key}"), info.version)


async def admit(store: ObjectStore, *, overwrite: bool, options: CommitOptions) -> Seen:
    """Looks at the URL, and at what the store can do, before a save.

    Raises:
        CheckpointExists: a committed checkpoint is there and may not be replaced.
        Unsupported: the store ignores the conditions on which the commit rests.
    """
    seen = await read_register(store)
    refusal = protocol.admit(seen, overwrite=overwrite, url=store.url)
    if refusal:
        raise refusal
    await check_conditions(store, options)
    return seen


async def check_conditions(store: ObjectStore, options: CommitOptions) -> None:
    """Refuses a store that ignores the conditions on which every change of `COMMIT` rests.

    Raises:
        Unsupported: unless `options.allow_unsafe_commit`.
    """
    if options.allow_unsafe_commit:
        return
    capabilities = await store.capabilities()
    if not (capabilities.conditional_create and capabilities.conditional_replace):
        hint = (
            "use a store with conditional writes (If-None-Match, If-Match), or, if nobody else ever saves to this "
            "URL, pass allow_unsafe_commit=True"
        )
        raise Unsupported("the store ignores conditional writes, so a commit could not be atomic", store.url, hint)


async def open_manifest(
    store: ObjectStore, accept: Callable[[Register, str], None] | None = None, keys: Keyring = NO_KEYS
) -> tuple[Register, bytes]:
    """The register, and the bytes of the manifest that it points to.

    Args:
        accept: raises if the register, at a URL, is not to be trusted; asked before anything else is read.
        keys: of encrypted checkpoints.

    Raises:
        CheckpointNotFound: nothing is there; CheckpointIncomplete: only data; CheckpointDeleted: no longer.
        CheckpointPerRank: only checkpoints of single ranks.
        CorruptManifest: the manifest is gone.
        EncryptionKeyMissing, WrongEncryptionKey: it is encrypted, and `keys` do not open it.
    """
    try:
        return await _open_manifest(store, accept, keys)
    except (CorruptManifest, DecryptionFailed, SignatureError):
        # A bit that flipped on the way, in COMMIT or in the manifest, is right the second time.
        return await _open_manifest(store, accept, keys)


async def _open_manifest(
    store: ObjectStore, accept: Callable[[Register, str], None] | None, keys: Keyring
) -> tuple[Register, bytes]:
    register, reference = await committed(store, accept)
    return register, await read_manifest(await keys.unsealed(store, register), reference)


async def read_manifest(store: ObjectStore, reference: ManifestRef, *, under: str = "") -> bytes:
    """The manifest that `reference` names, below the path `under`, held against it.

    Raises:
        CorruptManifest: it is gone, or another.
    """
    key = join(under, reference.key)
    where = f"{store.url}/{key}"
    try:
        data, _ = await store.get(key, limit=min(_MANIFEST_LIMIT, reference.size))
    except NotFound:
        raise CorruptManifest("the manifest that COMMIT names is gone", where, "load an earlier checkpoint") from None
    except DecryptionFailed:
        raise
    except Damaged as error:
        raise CorruptManifest(f"the manifest is not the one that COMMIT names: {error.message}", where) from None
    manifests.check(data, reference, where)
    return data


async def committed(store: ObjectStore, accept: Callable[[Register, str], None] | None) -> tuple[Register, ManifestRef]:
    """The register, once `accept` let it pass, and where it says that the manifest is.

    Raises:
        As `open_manifest`.
    """
    register = (await read_register(store)).register
    if register is None:
        raise await nothing_here(store)
    if register.manifest is None:
        if await rank_roots(store):
            # A save for all ranks was given up or deleted here; it says nothing of those of single ranks.
            raise _per_rank(store)
        raise CheckpointDeleted(f"the checkpoint is {register.state}", store.url, "load another one")
    if accept is not None:
        accept(register, store.url)
    return register, register.manifest


async def explained(store: ObjectStore, attempt: str, damage: Damaged) -> CkptCloudError:
    """Why a load of `attempt` met `damage`: it was replaced or deleted meanwhile, or `damage` itself."""
    try:
        register = (await read_register(store)).register
    except CkptCloudError:
        return damage
    if register is None or register.state != "committed":
        return CheckpointDeleted("the checkpoint was deleted while it was being loaded", store.url, "load another one")
    if register.attempt != attempt:
        return CheckpointChanged("the checkpoint was replaced while it was being loaded", store.url, "load again")
    return damage


async def move_register(
    store: ObjectStore, decide: Callable[[Seen], Register | None], options: CommitOptions, *, under: str = ""
) -> Seen:
    """Reads the register, and replaces exactly what was read by what `decide` makes of it; again if it changed.

    Returns:
        The register for which `decide` wanted nothing more.

    Raises:
        Unsupported: the store ignores conditions.
        StoreUnavailable: no clear answer within `options.deadline_s`; whoever wanted to delete anything may not.
    """
    await check_conditions(store, options)
    give_up = time.monotonic() + options.deadline_s
    for pause in _pauses(options):
        seen = await read_register(store, under=under)
        wanted = decide(seen)
        if wanted is None:
            return seen
        condition = CREATE if seen.version is None else Replace(seen.version)
        if await _answer(store, join(under, COMMIT_KEY), wanted, condition) is Answer.APPLIED:
            return Seen(wanted)
        if time.monotonic() + pause > give_up:
            break
        await asyncio.sleep(pause)
    message = f"no clear answer about COMMIT within {options.deadline_s:.0f} s; nothing was deleted"
    raise StoreUnavailable(message, f"{store.url}/{join(under, COMMIT_KEY)}", "try again")


async def _answer(store: ObjectStore, key: str, register: Register, condition: Condition) -> Answer:
    try:
        async with asyncio.timeout(_REGISTER_TIMEOUT_S):
            await store.put(key, registers.encode(register), condition)
    except (AlreadyExists, PreconditionFailed, NotFound):
        return Answer.REFUSED
    except (*_UNCLEAR, TimeoutError):
        return Answer.UNCLEAR
    return Answer.APPLIED


async def publish(
    store: ObjectStore,
    body: Manifest,
    *,
    oldest: str,
    seen: Seen,
    overwrite: bool,
    options: CommitOptions,
    metrics: dict[str, float] | None = None,
    sign: Callable[[Register], Register] | None = None,
    seal: Seal | None = None,
) -> Register:
    """Stores the manifest, then makes the checkpoint visible by one conditional PUT.

    Args:
        oldest: the oldest id under which data of this save was written.
        seen: the register as `admit` read it.
        metrics: to be kept in `COMMIT` itself.
        sign: signs the register.
        seal: encrypts the manifest, as it did all data.

    Raises:
        CheckpointExists, StaleWrite, AttemptAborted: another writer or a collector was first; nothing was published.
        CommitStateUnknown: no clear answer within `options.deadline_s`; nothing may be deleted.
    """
    data = manifests.encode(body, salt=os.urandom(_SALT_BYTES) if seal else b"")
    key = manifest_key(body.attempt)
    await (seal.store(store) if seal else store).put(key, data)
    fence = seen.register.fence if seen.register else NO_ID
    register = Register(
        "committed",
        body.attempt,
        fence,
        manifests.reference(key, data),
        ((CODED_CHUNKS,) if manifests.is_coded(body) else ()) + ((ENCRYPTED,) if seal else ()),
        metrics=metrics or UNSET,
        encryption=seal.note if seal else UNSET,
    )
    if sign is not None:
        # A call to a key service may take its time.
        register = await in_thread(sign, register)
    intent = Intent(register, oldest, overwrite, protocol.base_of(seen.register))
    await _Publication(store, intent, options).run(seen)
    return register


@dataclass(frozen=True, slots=True)
class _Publication:
    """One run of the protocol."""

    store: ObjectStore
    intent: Intent
    options: CommitOptions

    async def run(self, seen: Seen) -> None:
        """Until the protocol says that it is committed or failed, or time is out."""
        unknown = protocol.out_of_time(self.intent, self.store.url)
        give_up = time.monotonic() + self.options.deadline_s
        pauses = _pauses(self.options)
        step: Step = protocol.first_step(self.intent, seen, self.store.url)
        in_doubt = False
        while isinstance(step, Put):
            try:
                answer = await self._send(step)
            except CkptCloudError as error:
                # A clear no to this put says nothing of an earlier one that may land yet.
                if in_doubt:
                    raise _because(unknown, error) from None
                if await self._is_ours():
                    return
                raise
            except Exception as error:
                # What is unforeseen may have gone wrong after the store had said yes.
                raise _because(unknown, error) from error
            in_doubt = in_doubt or answer is Answer.UNCLEAR
            step = await self._learn(step, answer, give_up, unknown)
            if isinstance(step, Put):
                pause = next(pauses)
                if time.monotonic() + pause > give_up:
                    raise unknown
                await asyncio.sleep(pause)
        if isinstance(step, Failed):
            raise step.error

    async def _learn(self, put: Put, answer: Answer, give_up: float, unknown: CkptCloudError) -> Step:
        step = protocol.after_put(answer)
        if not isinstance(step, ReadBack):
            return step
        seen = await self._read_back(give_up, unknown)
        return protocol.after_read_back(self.intent, put, seen, self.store.url)

    async def _send(self, put: Put) -> Answer:
        condition = CREATE if put.replaces is None else Replace(put.replaces)
        register = structs.replace(self.intent.register, fence=put.fence)
        return await _answer(self.store, COMMIT_KEY, register, condition)

    async def _is_ours(self) -> bool:
        """Whether COMMIT is what was sent, whatever the answer: one that cannot be read is no better than a no."""
        try:
            now = (await read_register(self.store)).register
        except CkptCloudError:
            return False
        return protocol.base_of(now) == self.intent.register.attempt

    async def _read_back(self, give_up: float, unknown: CkptCloudError) -> Seen:
        """Reads the register for as long as there is time; without an answer nothing is known.

        Not even a refusal to let us read may be taken for a failed commit.
        """
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(_UNCLEAR),
            stop=tenacity.stop_after_delay(max(0.0, give_up - time.monotonic())),
            wait=tenacity.wait_random_exponential(self.options.pause_s, self.options.max_pause_s),
            reraise=True,
        )
        try:
            return await retrying(read_register, self.store)
        except CkptCloudError as error:
            raise _because(unknown, error) from None
        except Exception as error:
            raise _because(unknown, error) from error


def _because(unknown: CkptCloudError, error: Exception) -> CkptCloudError:
    unknown.add_note(f"the last answer was {type(error).__name__}: {error}")
    return unknown


def _pauses(options: CommitOptions) -> Iterator[float]:
    """Growing pauses with full jitter."""
    longest = options.pause_s
    while True:
        yield random.uniform(0, longest)
        longest = min(options.max_pause_s, longest * 2)


async def rank_roots(store: ObjectStore) -> list[str]:
    """Paths of the checkpoints of single ranks at `store`, in their order."""
    return [name for name in await store.list_children() if is_rank_path(name)]


def _per_rank(store: ObjectStore) -> CkptCloudError:
    return CheckpointPerRank("each rank has a checkpoint of its own here", store.url, "load with as many ranks")


async def nothing_here(store: ObjectStore) -> CkptCloudError:
    """Tells a save without a commit, and ranks' own checkpoints, from an empty place."""
    children = await store.list_children()
    if any(map(is_rank_path, children)):
        return _per_rank(store)
    if DATA_PREFIX.rstrip("/") in children:
        message = "there is data but no COMMIT: a save that died, or one that is still running"
        return CheckpointIncomplete(message, store.url, "load an earlier checkpoint, or wait for the save to end")
    hint = "check the URL; ckpt_cloud.latest(root) finds the newest committed checkpoint under a root"
    return CheckpointNotFound("no checkpoint is here", store.url, hint)
