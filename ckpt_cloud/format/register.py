"""`COMMIT`: a small JSON register, the one commit point of a checkpoint."""

from __future__ import annotations

from typing import Literal

import msgspec

from ckpt_cloud.errors import CorruptCommit, Unsupported
from ckpt_cloud.format.layout import NO_ID, is_id, is_key

FORMAT = "ckpt-cloud"
VERSION = 2
"""1 had manifests in one piece; they are still read."""
CODED_CHUNKS = "coded-chunks"
"""Flag of a checkpoint of which some chunks or items are not stored as their plain bytes (`format.codec`)."""
ENCRYPTED = "encrypted"
"""Flag of a checkpoint whose objects are sealed (`format.sealing`)."""
KNOWN_FLAGS: frozenset[str] = frozenset({CODED_CHUNKS, ENCRYPTED})
MAX_BYTES = 64 << 10


class ManifestRef(msgspec.Struct, frozen=True):
    """Where the manifest is and what it must be.

    Attributes:
        key: relative to the checkpoint's URL.
        size: in bytes.
        sha256: hexadecimal digest of its root (`format.pages`), or where that has no length, of the whole.
        root: bytes of the root, at the manifest's end.
    """

    key: str
    size: int
    sha256: str
    root: int = 0


class Signature(msgspec.Struct, frozen=True):
    """Who vouches for a committed register.

    Attributes:
        algorithm: `ed25519`.
        key: first digits of the public key, for people; may be empty.
        value: hexadecimal.
    """

    algorithm: str
    key: str
    value: str


class Encryption(msgspec.Struct, frozen=True):
    """With what the objects of a checkpoint are sealed.

    Attributes:
        algorithm: `aes-256-gcm`.
        key_id: the user's name for the key; by default its check value.
        check: hexadecimal value that tells the key from others, and nothing about it.
    """

    algorithm: str
    key_id: str
    check: str


class Register(msgspec.Struct, frozen=True, omit_defaults=False):
    """State of a checkpoint URL.

    Attributes:
        state: `committed` points to data; `aborted` and `deleted` point to none.
        attempt: id of the save that wrote this register.
        fence: no save whose oldest id is below it may ever commit here.
        manifest: set when committed.
        flags: features that a reader must know.
        signature: of what the register says of the manifest (`ckpt_cloud.signing`); left out where there is none.
        metrics: numbers that the saver gave, such as a loss; here so that the best of many checkpoints is found
            without their manifests. Left out where there are none.
        encryption: set if and only if `flags` say that the checkpoint is encrypted.
    """

    state: Literal["committed", "aborted", "deleted"]
    attempt: str
    fence: str = NO_ID
    manifest: ManifestRef | None = None
    flags: tuple[str, ...] = ()
    format: str = FORMAT
    version: int = VERSION
    signature: Signature | msgspec.UnsetType = msgspec.UNSET
    metrics: dict[str, float] | msgspec.UnsetType = msgspec.UNSET
    encryption: Encryption | msgspec.UnsetType = msgspec.UNSET


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Register)


def encode(register: Register) -> bytes:
    """The register as JSON, indented for people."""
    return msgspec.json.format(_encoder.encode(register), indent=2) + b"\n"


def decode(data: bytes, url: str) -> Register:
    """The register in `data`.

    Raises:
        CorruptCommit: not a register, or one that contradicts itself.
        Unsupported: written by a newer version, or with a flag unknown to this one.
    """
    if len(data) > MAX_BYTES:
        raise CorruptCommit(f"COMMIT has {len(data)} bytes, at most {MAX_BYTES} are possible", url)
    _check_version(data, url)
    try:
        register = _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptCommit(f"COMMIT does not decode: {error}", url) from error
    _check(register, url)
    return register


class _Version(msgspec.Struct):
    format: str
    version: int
    flags: tuple[str, ...] = ()


def _check_version(data: bytes, url: str) -> None:
    """Looks at the version before anything else, since a newer one may have other fields."""
    try:
        seen = msgspec.json.decode(data, type=_Version)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptCommit(f"COMMIT does not decode: {error}", url) from error
    if seen.format != FORMAT:
        raise CorruptCommit(f"COMMIT is of format {seen.format[:50]!r}, not {FORMAT!r}", url)
    if seen.version < 1:
        raise CorruptCommit(f"COMMIT has format version {seen.version}", url)
    if seen.version > VERSION:
        hint = f"load it with a ckpt_cloud that knows format {seen.version}"
        raise Unsupported(f"the checkpoint has format version {seen.version}, this library knows {VERSION}", url, hint)
    unknown = sorted(set(seen.flags) - KNOWN_FLAGS)
    if unknown:
        raise Unsupported(f"the checkpoint needs features unknown here: {', '.join(unknown)[:200]}", url)


def _check(register: Register, url: str) -> None:
    if not (is_id(register.attempt) and is_id(register.fence)):
        raise CorruptCommit("COMMIT has a malformed id", url)
    if (register.state == "committed") != (register.manifest is not None):
        raise CorruptCommit(f"COMMIT is {register.state} and its manifest entry does not fit that", url)
    if (ENCRYPTED in register.flags) != (register.encryption is not msgspec.UNSET):
        raise CorruptCommit("COMMIT contradicts itself on whether the checkpoint is encrypted", url)
    if register.manifest is not None:
        reference = register.manifest
        sane = is_key(reference.key) and reference.size > 0 and 0 <= reference.root <= reference.size
        if not sane or len(register.manifest.sha256) != 64:
            raise CorruptCommit("COMMIT has a malformed manifest entry", url)
