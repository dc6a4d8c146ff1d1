"""Signatures on `COMMIT`, by Ed25519 (RFC 8032).

What is signed names the manifest by its SHA-256; a signed manifest names every block of every object by its own. So a
signature that holds covers each byte, and a ranged read can be held against it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import structs

from ckpt_cloud.errors import InvalidOption, NotEncrypted, SignatureError, Unsupported
from ckpt_cloud.format.manifest import Manifest
from ckpt_cloud.format.register import ENCRYPTED, Register, Signature

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

ALGORITHM = "ed25519"
_SIGNATURE_BYTES = 64
_SHOWN_BYTES = 8
"""Of a public key, beside the signature, for people."""

SignWith = Any
"""An `Ed25519PrivateKey`, the path of one in PEM, its PEM as bytes, or a function from what is to be signed to the
signature, such as a call to a key service."""
TrustedKey = Any
"""An `Ed25519PublicKey`, the path of one in PEM, or its PEM as bytes."""


def payload(register: Register) -> bytes:
    """The bytes that are signed. Not the fence, which a collector may raise, nor the URL: a checkpoint may be copied.

    Raises:
        InvalidOption: the register names no manifest.
    """
    manifest = register.manifest
    if manifest is None:
        raise InvalidOption("only a committed register can be signed")
    numbers = (str(manifest.size), manifest.sha256, str(manifest.root))
    lines = ("ckpt-cloud commit 2", register.attempt, manifest.key, *numbers)
    return "".join(f"{line}\n" for line in lines).encode()


class Signer:
    """Signs registers with a private key, which neither `repr` nor a pickle shows; a path to one travels.

    Raises:
        InvalidOption: what was given is no Ed25519 key, or no key can be read there.
        Unsupported: the library `cryptography` is not installed.
    """

    def __init__(self, sign: SignWith) -> None:
        self._given = sign
        # Locals may be shown beside a traceback.
        del sign
        if not callable(self._given):
            # Found out now, not after a save has sent its data.
            self._key()

    @classmethod
    def of(cls, sign: SignWith | Signer | None) -> Signer | None:
        """What was given, checked; it may have been before."""
        return sign if sign is None or isinstance(sign, Signer) else cls(sign)

    def __repr__(self) -> str:
        return "<Signer>"

    def __getstate__(self) -> dict[str, Any]:
        return {"_given": self._given if isinstance(self._given, str | os.PathLike) else None}

    def ready(self) -> None:
        """Looks whether there is something to sign with, before a byte is sent.

        Raises:
            Unsupported: the key did not travel to this process.
        """
        if self._given is None:
            hint = "give sign= the path of the key, or use async_save with threads: keys are not pickled"
            raise Unsupported("the key for signing did not travel to this process", hint=hint)

    def signed(self, register: Register) -> Register:
        """`register` with a signature."""
        self.ready()
        message = payload(register)
        if callable(self._given):
            value, name = self._given(message), ""
        else:
            key = self._key()
            value, name = key.sign(message), key.public_key().public_bytes_raw()[:_SHOWN_BYTES].hex()
        if not isinstance(value, bytes) or len(value) != _SIGNATURE_BYTES:
            raise InvalidOption("the function given as sign= must return an Ed25519 signature of 64 bytes")
        return structs.replace(register, signature=Signature(ALGORITHM, name, value.hex()))

    def _key(self) -> Ed25519PrivateKey:
        with _library():
            from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
            from cryptography.hazmat.primitives.serialization import load_pem_private_key
        if isinstance(self._given, Ed25519PrivateKey):
            return self._given
        key = _from_pem(self._given, "sign=", lambda pem: load_pem_private_key(pem, password=None))
        if not isinstance(key, Ed25519PrivateKey):
            raise InvalidOption("sign= is not an Ed25519 private key")
        return key


@dataclass(frozen=True, slots=True)
class Trust:
    """What a reader demands of a checkpoint: whose signature it believes, and that nobody could have read it.

    Attributes:
        keys: public keys, 32 bytes each; not secret.
        required: refuse what carries no signature.
        encrypted: refuse what is not encrypted.
    """

    keys: tuple[bytes, ...] = ()
    required: bool = False
    encrypted: bool = False

    @classmethod
    def of(
        cls,
        trusted_keys: TrustedKey | Iterable[TrustedKey] | None,
        require_signature: bool | None,
        require_encryption: bool | None = None,
        *,
        verify: bool = True,
    ) -> Trust:
        """From what a user gives; with keys a signature is required unless the user says otherwise.

        Raises:
            InvalidOption: no Ed25519 public key, or none in what should hold some; a signature is required and no key
                is trusted; or there are keys and not all that comes is to be verified.
            Unsupported: the library `cryptography` is not installed.
        """
        given = [] if trusted_keys is None else _listed(trusted_keys)
        if trusted_keys is not None and not given:
            raise InvalidOption("trusted_keys= holds no key", hint="leave it out to load whatever is there")
        if require_signature and not given:
            raise InvalidOption("require_signature=True needs trusted_keys=")
        if given and not verify:
            raise InvalidOption("trusted_keys= needs verify=True: a signature is held against every byte")
        keys = tuple(_public(key) for key in given)
        return cls(keys, bool(given) and require_signature is not False, bool(require_encryption))

    def check(self, register: Register, url: str) -> None:
        """Holds the register's signature against the keys, if there are any.

        Raises:
            NotEncrypted: it should be, and is not.
            SignatureError: there is none and one is required, or it is by none of the keys, or of something else.
        """
        if self.encrypted and ENCRYPTED not in register.flags:
            hint = "somebody who lacks the key put it there, or it was saved without: find out before you load it"
            raise NotEncrypted("the checkpoint is not encrypted", url, hint)
        if not self.keys:
            return
        signature = register.signature
        if not isinstance(signature, Signature):
            if self.required:
                hint = "save with sign=, or, if that is not to be, read with require_signature=False"
                raise SignatureError("the checkpoint is not signed", url, hint)
            return
        if not any(_holds(key, signature, payload(register)) for key in self.keys):
            hint = "it was signed by another, or changed since: do not load it, or add its signer to trusted_keys"
            raise SignatureError("the signature is by none of the trusted keys", url, hint)

    def check_covers(self, manifest: Manifest, url: str) -> None:
        """Refuses a checkpoint that must be signed and whose manifest leaves data without digests.

        Raises:
            SignatureError: some object has none.
        """
        if self.required and any(entry.size and not entry.digests for entry in manifest.objects):
            raise SignatureError("the signature does not cover the data", url, "save it again with sign=")


def _holds(key: bytes, signature: Signature, message: bytes) -> bool:
    with _library():
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    if signature.algorithm != ALGORITHM:
        return False
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(bytes.fromhex(signature.value), message)
    except (InvalidSignature, ValueError):
        return False
    return True


def _public(given: TrustedKey) -> bytes:
    with _library():
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
        from cryptography.hazmat.primitives.serialization import load_pem_public_key
    key: Ed25519PublicKey | object = given
    if not isinstance(given, Ed25519PublicKey):
        key = _from_pem(given, "trusted_keys=", load_pem_public_key)
    if not isinstance(key, Ed25519PublicKey):
        raise InvalidOption("trusted_keys= holds something else than Ed25519 public keys")
    return key.public_bytes_raw()


def _listed(keys: Any) -> list[Any]:
    return list(keys) if isinstance(keys, list | tuple | set | frozenset) else [keys]


def _from_pem(given: object, option: str, load: Callable[[bytes], object]) -> object:
    """What PEM, or the file at a path, holds; says nothing of what is in it."""
    with _library():
        from cryptography.exceptions import UnsupportedAlgorithm
    if isinstance(given, str | os.PathLike):
        try:
            pem = Path(given).read_bytes()
        except OSError as error:
            raise InvalidOption(f"{option}: the key file cannot be read ({error.strerror})") from None
    elif isinstance(given, bytes):
        pem = given
    else:
        raise InvalidOption(f"{option} takes Ed25519 keys, paths of PEM files, or PEM as bytes")
    try:
        return load(pem)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        reason = type(error).__name__
    # Locals may be shown beside a traceback.
    del given, pem
    hint = "make one with: openssl genpkey -algorithm ed25519; for an encrypted one pass the key object"
    raise InvalidOption(f"{option} is no key in PEM that can be read ({reason})", hint=hint)


@contextlib.contextmanager
def _library() -> Any:
    try:
        yield
    except ImportError as error:
        raise Unsupported(
            "signatures need the library cryptography", hint="pip install 'ckpt-cloud[crypto]'"
        ) from error
