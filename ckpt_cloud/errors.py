"""Every error that ckpt_cloud raises.

    CkptCloudError
    ├── TryAgain                    the same call may succeed later
    │   ├── StoreUnavailable        unreachable, reset, timed out, or a 5xx
    │   ├── Throttled               the store asks for fewer requests
    │   ├── CheckpointChanged       replaced while it was being read
    │   ├── RankLost                another rank died or no longer answers; also a RuntimeError
    │   ├── SaveInFlight            an earlier save still runs in the background
    │   └── CommitStateUnknown      the commit may or may not have landed; nothing was deleted
    ├── FixRequest                  the call, the configuration or a permission must change first
    │   ├── InvalidURL              unknown scheme or malformed URL
    │   ├── InvalidOption           an option outside its range, or two that exclude each other
    │   ├── BucketNotFound
    │   ├── MissingCredentials
    │   ├── EncryptionKeyMissing    the checkpoint is encrypted, and no key was given
    │   ├── WrongEncryptionKey      the checkpoint was encrypted with another key
    │   ├── PermissionDenied
    │   ├── WrongRegion
    │   ├── UntrustedServer         its TLS certificate is not accepted
    │   ├── RequestRefused          the store answers that the request itself is wrong
    │   ├── Unsupported             the store, or this version, cannot do it
    │   ├── UnsupportedTensor       a tensor that has no bytes of its own to store
    │   ├── PlanMismatch            the planner's plan and its data disagree
    │   ├── StateMismatch           keys, shapes or dtypes of the state and the checkpoint disagree
    │   ├── UntrustedItem           a stored item that could run code when opened
    │   ├── UnknownKey              the checkpoint has no such entry; also a KeyError
    │   ├── SliceOutOfBounds        a slice reaches outside its tensor; also an IndexError
    │   └── RankFailed              a rank raised an error that is not ours, such as a planner's
    ├── ChooseAnother               this URL is taken, or holds nothing to load
    │   ├── CheckpointExists        also a FileExistsError
    │   ├── CheckpointNotFound      also a FileNotFoundError
    │   ├── CheckpointIncomplete    data but no commit: a save that died or still runs
    │   ├── CheckpointPerRank       only checkpoints of single ranks are here
    │   ├── CheckpointDeleted
    │   ├── StaleWrite              another save replaced the checkpoint first
    │   └── AttemptAborted          the save was ended, or given up by a collector; its data is gone
    ├── Damaged                     stored bytes are not what was saved
    │   ├── CorruptManifest
    │   ├── CorruptCommit
    │   ├── ChecksumMismatch
    │   ├── DecryptionFailed        an encrypted object was changed, cut short, or is another's
    │   ├── NotEncrypted            and only encrypted ones are to be loaded
    │   ├── SignatureError          not signed, or by nobody who is trusted
    │   ├── MissingObject
    │   ├── CorruptFile             a file of another format contradicts itself or its index
    │   └── IncompleteSave          a rank reported less than its plan; not committed
    └── StoreError                  what a single store operation answered, for code that talks to stores
        ├── NotFound                also a FileNotFoundError
        ├── AlreadyExists           also a FileExistsError
        ├── PreconditionFailed
        └── RangeNotSatisfiable     the object ends before the range does

The categories say what a handler does next. `kind` is a stable name for machines. Every class can be pickled,
since DCP sends exceptions between ranks, and none carries a secret.
"""

from __future__ import annotations

from typing import ClassVar

from ckpt_cloud.redaction import redacted


class CkptCloudError(Exception):
    """Root of all errors of ckpt_cloud.

    Args:
        message: what failed.
        url: the checkpoint or object concerned; secrets in it are removed.
        hint: what to do next.
    """

    kind: ClassVar[str] = "error"

    def __init__(self, message: str, url: str = "", hint: str = "") -> None:
        self.message = redacted(message)
        self.url = redacted(url)
        self.hint = hint
        super().__init__(self.message, self.url, self.hint)

    def __str__(self) -> str:
        where = f" ({self.url})" if self.url and self.url not in self.message else ""
        return f"{self.message}{where}" + (f"\nhint: {self.hint}" if self.hint else "")


class TryAgain(CkptCloudError):
    """The same call may succeed later, unchanged."""

    kind = "try-again"


class FixRequest(CkptCloudError):
    """The call, the configuration or a permission must change before it can succeed."""

    kind = "fix-request"


class ChooseAnother(CkptCloudError):
    """This checkpoint URL is taken, or holds nothing to load."""

    kind = "choose-another"


class Damaged(CkptCloudError):
    """What is stored is not what was saved."""

    kind = "damaged"


class StoreError(CkptCloudError):
    """What one operation on a store answered; checkpoints translate it into one of the other categories."""

    kind = "store-error"


class StoreUnavailable(TryAgain):
    """The store could not be reached, broke off, timed out or answered 5xx."""

    kind = "store-unavailable"


class Throttled(TryAgain):
    """The store asks for fewer requests (429, 503 SlowDown)."""

    kind = "throttled"


class CheckpointChanged(TryAgain):
    """The checkpoint was replaced while it was being read; a new load reads the new one."""

    kind = "checkpoint-changed"


class RankLost(TryAgain, RuntimeError):
    """Another rank died, or did not answer in time, while all ranks waited for each other.

    A save may have been committed all the same, if it was in its last step; what it left otherwise is the collector's.
    """

    kind = "rank-lost"


class SaveInFlight(TryAgain):
    """A save in the background has not ended, and the manager was told to refuse another beside it."""

    kind = "save-in-flight"


class CommitStateUnknown(TryAgain):
    """The commit's answer was lost and could not be read back: it may have landed. Nothing was deleted."""

    kind = "commit-state-unknown"


class InvalidURL(FixRequest, ValueError):
    """A URL with an unknown scheme, without a bucket, or with parts that it may not have."""

    kind = "invalid-url"


class InvalidOption(FixRequest, ValueError):
    """An option outside its range, unknown, or at odds with another."""

    kind = "invalid-option"


class BucketNotFound(FixRequest):
    """The bucket or container does not exist; ckpt_cloud never creates one."""

    kind = "bucket-not-found"


class MissingCredentials(FixRequest):
    """No credentials were found in any of the usual places."""

    kind = "missing-credentials"


class EncryptionKeyMissing(FixRequest):
    """The checkpoint is encrypted, and no key was given, or none for the key id that it names."""

    kind = "encryption-key-missing"


class WrongEncryptionKey(FixRequest):
    """The checkpoint was encrypted with another key than the one that was given."""

    kind = "wrong-encryption-key"


class PermissionDenied(FixRequest, PermissionError):
    """The store refused the credentials, or they lack a permission."""

    kind = "permission-denied"


class WrongRegion(FixRequest):
    """The bucket lives in another region than the request was signed for."""

    kind = "wrong-region"


class UntrustedServer(FixRequest):
    """The server's TLS certificate is of an unknown authority, for another name, or out of date."""

    kind = "untrusted-server"


class RequestRefused(FixRequest):
    """The store answered with a 4xx that says the request itself is wrong."""

    kind = "request-refused"


class Unsupported(FixRequest):
    """The store, the format version or this version of the library cannot do what was asked."""

    kind = "unsupported"


class UnsupportedTensor(FixRequest, TypeError):
    """A tensor that has no plain bytes of its own: sparse, meta, nested or quantized."""

    kind = "unsupported-tensor"


class PlanMismatch(FixRequest):
    """The planner's plan and the data that it resolved to disagree."""

    kind = "plan-mismatch"


class StateMismatch(FixRequest, ValueError):
    """Keys, shapes or dtypes of the state to load into differ from the checkpoint.

    Attributes:
        missing_keys: all that a rank's state has and the checkpoint has not, by the state's names.
        unexpected_keys: all that only the checkpoint has, by its own names.
    """

    kind = "state-mismatch"
    missing_keys: tuple[str, ...] = ()
    unexpected_keys: tuple[str, ...] = ()


class UntrustedItem(FixRequest):
    """A stored non-tensor item would run code when opened."""

    kind = "untrusted-item"


class UnknownKey(FixRequest, KeyError):
    """The checkpoint has no entry of that name."""

    kind = "unknown-key"


class SliceOutOfBounds(FixRequest, IndexError):
    """A slice reaches outside its tensor, or is of a form that tensors do not have."""

    kind = "slice-out-of-bounds"


class RankFailed(FixRequest, RuntimeError):
    """A rank raised an error that is not ours: a planner's, a `Stateful`'s."""

    kind = "rank-failed"


class CheckpointExists(ChooseAnother, FileExistsError):
    """A committed checkpoint is already there and `overwrite` is off."""

    kind = "checkpoint-exists"


class CheckpointNotFound(ChooseAnother, FileNotFoundError):
    """Nothing is there."""

    kind = "checkpoint-not-found"


class CheckpointIncomplete(CheckpointNotFound):
    """There is data but no commit: a save that died or is still running."""

    kind = "checkpoint-incomplete"


class CheckpointPerRank(CheckpointNotFound):
    """Ranks saved without coordination (`use_collectives=False`): each has a checkpoint of its own here."""

    kind = "checkpoint-per-rank"


class CheckpointDeleted(CheckpointNotFound):
    """The checkpoint was deleted or its save was given up; the register says so."""

    kind = "checkpoint-deleted"


class StaleWrite(ChooseAnother):
    """Another save replaced the checkpoint between our look and our commit."""

    kind = "stale-write"


class AttemptAborted(ChooseAnother):
    """A collector, or `ObjectStoreWriter.abort`, ended this save before it could commit; its data is gone."""

    kind = "attempt-aborted"


class CorruptManifest(Damaged):
    """The manifest does not decode, fails its digest, or contradicts itself."""

    kind = "corrupt-manifest"


class CorruptCommit(Damaged):
    """`COMMIT` does not decode."""

    kind = "corrupt-commit"


class ChecksumMismatch(Damaged):
    """Bytes came back other than they were saved, twice."""

    kind = "checksum-mismatch"


class DecryptionFailed(Damaged):
    """Blocks of an encrypted object are not what was encrypted there: changed, moved, cut short, or another's.

    Attributes:
        ranges: bytes of the object as it was saved that cannot be had, first and end of each.
    """

    kind = "decryption-failed"
    ranges: tuple[tuple[int, int], ...] = ()


class NotEncrypted(Damaged):
    """The checkpoint is not encrypted, and only encrypted ones are to be loaded."""

    kind = "not-encrypted"


class SignatureError(Damaged):
    """The checkpoint is not signed, or not by a key that the reader trusts, or was changed since."""

    kind = "signature"


class MissingObject(Damaged):
    """A data object that the manifest names is not there, or is shorter than recorded."""

    kind = "missing-object"


class CorruptFile(Damaged):
    """A file of another format does not decode, or contradicts itself or the index that names it."""

    kind = "corrupt-file"


class IncompleteSave(Damaged):
    """A rank reported less than its plan, or two claim one chunk; nothing was committed."""

    kind = "incomplete-save"


class NotFound(StoreError, FileNotFoundError):
    """No object has this key."""

    kind = "not-found"


class AlreadyExists(StoreError, FileExistsError):
    """An object has this key and the write was create-only."""

    kind = "already-exists"


class PreconditionFailed(StoreError):
    """The object is not the version that the request named."""

    kind = "precondition-failed"


class RangeNotSatisfiable(StoreError):
    """The object ends before the range that was asked for."""

    kind = "range-not-satisfiable"
