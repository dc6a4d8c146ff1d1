"""The commit protocol as pure functions: what we want and what we saw in, the next step out.

One conditional single-request PUT of `COMMIT` decides. Its answer may be lost, so the register is read back, and the
attempt id inside it, not the answer, says who won. `docs/commit.md` lists the answers one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from msgspec import UNSET, structs

from ckpt_cloud.errors import (
    AttemptAborted,
    CheckpointExists,
    CkptCloudError,
    CommitStateUnknown,
    StaleWrite,
)
from ckpt_cloud.format.layout import NO_ID
from ckpt_cloud.format.register import Register


class Answer(Enum):
    """What came back for the conditional PUT."""

    APPLIED = auto()
    REFUSED = auto()
    """412, a 404 to a replace, Azure's 409 BlobAlreadyExists: the condition did not hold."""
    UNCLEAR = auto()
    """409 in a race, 408, 429, 5xx, a timeout or a reset: it may have landed, or land yet."""


@dataclass(frozen=True, slots=True)
class Seen:
    """The register as it was read: None where there is none, with the version to replace."""

    register: Register | None
    version: str | None = None


@dataclass(frozen=True, slots=True)
class Intent:
    """A save that wants to commit.

    Attributes:
        register: to be published; its fence is taken from the register that it replaces.
        oldest: the oldest id under which this save wrote data.
        overwrite: whether a committed checkpoint may be replaced.
        base: attempt of the committed checkpoint that was there when the save began; empty where there was none.
    """

    register: Register
    oldest: str
    overwrite: bool
    base: str = ""


@dataclass(frozen=True, slots=True)
class Put:
    """Send the register with this fence, creating it (`replaces` is None) or replacing exactly that version."""

    replaces: str | None
    fence: str = NO_ID


@dataclass(frozen=True, slots=True)
class ReadBack:
    """Read the register to learn what the answer meant."""


@dataclass(frozen=True, slots=True)
class Committed:
    """The checkpoint is visible."""


@dataclass(frozen=True, slots=True)
class Failed:
    """It is not ours, for this reason."""

    error: CkptCloudError


Step = Put | ReadBack | Committed | Failed


def admit(seen: Seen, *, overwrite: bool, url: str) -> CkptCloudError | None:
    """Before a byte is sent: why a save to this URL must be refused, or None."""
    if seen.register is not None and seen.register.state == "committed" and not overwrite:
        hint = "choose another URL, or pass overwrite=True to replace it atomically"
        return CheckpointExists("a committed checkpoint is already here", url, hint)
    return None


def is_fenced_off(oldest: str, seen: Seen) -> bool:
    """Whether a save whose oldest id this is can never commit."""
    return seen.register is not None and oldest < seen.register.fence


def first_step(intent: Intent, seen: Seen, url: str) -> Put | Failed:
    """What to do when all data and the manifest are stored; `seen` is the register read at the save's start."""
    if seen.register is None:
        return Put(None)
    if is_fenced_off(intent.oldest, seen):
        return Failed(_aborted(url))
    refusal = admit(seen, overwrite=intent.overwrite, url=url)
    return Failed(refusal) if refusal else Put(seen.version, seen.register.fence)


def after_put(answer: Answer) -> Committed | ReadBack:
    """Only a clear yes is believed: a refusal may be the echo of our own lost success."""
    return Committed() if answer is Answer.APPLIED else ReadBack()


def after_read_back(intent: Intent, sent: Put, seen: Seen, url: str) -> Step:
    """What a read-back proves about the put that was `sent`."""
    now = seen.register
    if now is not None and now.state == "committed" and now.attempt == intent.register.attempt:
        return Committed()
    if seen.version == sent.replaces:
        # Unchanged: an unclear put may still land, and a refusal was about something that is gone. The same
        # conditional put decides it, and can win at most once.
        return sent
    if now is not None and intent.oldest >= now.fence and base_of(now) in ("", intent.base):
        # Somebody raised the fence below us, or deleted what was there: no other save was published.
        return Put(seen.version, now.fence)
    return Failed(_lost(intent, now, url))


def base_of(register: Register | None) -> str:
    """The attempt that `register` makes visible; empty for none."""
    return register.attempt if register is not None and register.state == "committed" else ""


def fenced_off(seen: Seen, fence: str) -> Register | None:
    """The register to write so that no save with an id below `fence` can ever commit; None if none can already.

    Whoever wants to delete data of saves that are not committed writes it first, over exactly what was seen.
    """
    if seen.register is None:
        return Register("aborted", fence, fence)
    return structs.replace(seen.register, fence=fence) if seen.register.fence < fence else None


def deleted(seen: Seen, fence: str) -> Register | None:
    """The register of a checkpoint that is to be deleted, before any of its data is; None if it says so already."""
    if seen.register is None or seen.register.state != "committed":
        return fenced_off(seen, fence)
    fence = max(fence, seen.register.fence)
    return structs.replace(seen.register, state="deleted", manifest=None, fence=fence, metrics=UNSET)


def out_of_time(intent: Intent, url: str) -> CommitStateUnknown:
    """The deadline ran out before anything was proved."""
    hint = "nothing was deleted; look at the URL again later: it holds this save if COMMIT names its attempt"
    message = f"no clear answer to the commit of attempt {intent.register.attempt}"
    return CommitStateUnknown(message, url, hint)


def _lost(intent: Intent, now: Register | None, url: str) -> CkptCloudError:
    if now is not None and intent.oldest < now.fence:
        return _aborted(url)
    if now is not None and now.state == "committed" and not intent.overwrite:
        return CheckpointExists("another save committed here first", url, "choose another URL")
    return StaleWrite("another save changed this checkpoint first; ours was not published", url, "save again")


def _aborted(url: str) -> AttemptAborted:
    return AttemptAborted("this save was given up by a collector before it could commit", url, "save again")
