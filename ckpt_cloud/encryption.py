"""Encryption keys as users give them, and the stores of checkpoints that are encrypted with them."""

from __future__ import annotations

import base64
import binascii
import os
import pickle
from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any

from msgspec import UNSET

from ckpt_cloud.errors import CkptCloudError, EncryptionKeyMissing, InvalidOption, Unsupported, WrongEncryptionKey
from ckpt_cloud.format.layout import join
from ckpt_cloud.format.manifest import ObjectEntry
from ckpt_cloud.format.register import Encryption, Register
from ckpt_cloud.format.sealing import ALGORITHM, KEY_BYTES, MasterKey, ObjectKey
from ckpt_cloud.stores import ObjectStore
from ckpt_cloud.stores.sealed import SealedStore
from ckpt_cloud.workers import in_waiting_thread

EncryptionKey = bytes | str | os.PathLike[str] | Callable[[str], "bytes | str"]
"""32 bytes; the same as hexadecimal digits or Base64; the path (`pathlib.Path`) of a file that holds one of these; or a
function from a key id to one."""

_KEY_FILE_BYTES = 4096
_MAX_ID_CHARACTERS = 1024


@dataclass(frozen=True, slots=True)
class Seal:
    """What a save seals its objects with.

    Attributes:
        note: for `COMMIT`.
    """

    key: MasterKey
    note: Encryption

    def store(self, inner: ObjectStore) -> SealedStore:
        """`inner`, with what is put sealed."""
        return SealedStore(inner, self.key)

    def of_object(self, key: str) -> ObjectKey:
        """What seals the object at a data key."""
        return self.key.of_object(key)


class Keyring:
    """The keys that one was given; neither `repr` nor a pickle shows any. A path and a function travel, keys do not.

    Raises:
        InvalidOption: what was given is no key, or cannot be read.
        Unsupported: the library `cryptography` is not installed.
    """

    def __init__(self, given: EncryptionKey | None = None, key_id: str | None = None) -> None:
        if key_id is not None and (given is None or not 0 < len(key_id) <= _MAX_ID_CHARACTERS):
            limits = f"is a text of at most {_MAX_ID_CHARACTERS} characters"
            raise InvalidOption(f"encryption_key_id goes with encryption_key, and {limits}")
        self._id = key_id
        self._function = given if callable(given) else None
        self._path = given if isinstance(given, os.PathLike) else None
        # Found out now, not after a save has begun.
        self._key = None if given is None or self._function else _master(given, "encryption_key=")
        self._left_behind = False
        # Grows: keys that the function gave, by id.
        self._known: dict[str, MasterKey] = {}

    @classmethod
    def of(cls, given: EncryptionKey | Keyring | None, key_id: str | None = None) -> Keyring:
        """What was given, checked; it may have been before."""
        if not isinstance(given, Keyring):
            return cls(given, key_id)
        return given if key_id is None else given.named(key_id)

    def named(self, key_id: str) -> Keyring:
        """The same keys, to encrypt with the one of this id."""
        other = copy(self)
        other.__dict__.update(self.__dict__, _id=key_id, _known={})
        return other

    def __repr__(self) -> str:
        return "<Keyring>" if self else "<Keyring without keys>"

    def __bool__(self) -> bool:
        """Whether there are any, or were before they were left behind."""
        return self._key is not None or self._function is not None or self._left_behind

    def __getstate__(self) -> dict[str, Any]:
        function = self._function if self._function is not None and _travels(self._function) else None
        left = self._left_behind or (bool(self) and function is None and self._path is None)
        return {"_id": self._id, "_function": function, "_path": self._path, "_left_behind": left}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _known={}, _key=None)
        if self._path is not None:
            self._key = _master(self._path, "encryption_key=")

    def like(self, register: Register) -> Keyring:
        """The same keys, to encrypt with the one of `register` by its name, if it is among them and none is named."""
        note = register.encryption
        if self._id is None and isinstance(note, Encryption):
            same = self._function is not None or (self._key is not None and self._key.check == note.check)
            return self.named(note.key_id) if same else self
        return self

    def seal(self) -> Seal | None:
        """What to seal a save with; None if there are no keys. May call the function, and so take its time.

        Raises:
            EncryptionKeyMissing: the key did not travel to this process, or the function failed.
            InvalidOption: a function, and nobody says for which id.
        """
        if not self:
            return None
        self._ready("")
        key_id = self._id
        if key_id is None and self._function is not None:
            hint = "pass encryption_key_id=, which is kept in COMMIT and given to the function, on loading too"
            raise InvalidOption("encryption_key= is a function, and nobody says which key to encrypt with", hint=hint)
        key = self._find(key_id or "", "")
        return Seal(key, Encryption(ALGORITHM, key_id or key.check, key.check))

    async def unsealed(
        self, store: ObjectStore, register: Register, objects: Iterable[ObjectEntry] = (), *, under: str = ""
    ) -> ObjectStore:
        """`store`, with the objects of the checkpoint that `register` commits as they were before they were sealed.

        Args:
            objects: of its manifest, if that is known; their sizes then need not be asked for.
            under: path of the checkpoint below the URL of `store`.

        Raises:
            EncryptionKeyMissing: it is encrypted, and there is no key.
            WrongEncryptionKey: it is encrypted with another.
            Unsupported: in a way that this version does not know.
        """
        if not is_encrypted(register):
            return store
        key = await in_waiting_thread(self._matching, register, join(store.url, under).rstrip("/"))
        sizes = {join(under, entry.key): entry.size for entry in objects}
        if register.manifest is not None:
            sizes[join(under, register.manifest.key)] = register.manifest.size
        return SealedStore(store, key, sizes, under=under)

    async def unsealed_like(self, store: ObjectStore, register: Register | None, *, under: str) -> ObjectStore:
        """`store`, for objects of a checkpoint whose own register is gone, with the likeliest key.

        Args:
            register: the one that replaced it.

        Raises:
            EncryptionKeyMissing: there is none.
        """
        url = join(store.url, under).rstrip("/")
        if not self or (self._function is not None and (register is None or not is_encrypted(register))):
            hint = "give the encryption key, or wait until what was replaced is older than the grace age"
            raise EncryptionKeyMissing("what a replaced checkpoint held cannot be read without its key", url, hint)
        self._ready(url)
        note = register.encryption if register is not None else UNSET
        key_id = note.key_id if isinstance(note, Encryption) else ""
        return SealedStore(store, await in_waiting_thread(self._find, key_id, url), under=under)

    def _matching(self, register: Register, url: str) -> MasterKey:
        note = register.encryption
        assert isinstance(note, Encryption), "it says that it is encrypted"
        if note.algorithm != ALGORITHM:
            raise Unsupported(f"the checkpoint is encrypted with {note.algorithm[:50]!r}, unknown here", url)
        if not self:
            hint = "pass encryption_key= (ckpt-cloud: --encryption-key-file, or CKPT_CLOUD_ENCRYPTION_KEY)"
            raise EncryptionKeyMissing(f"the checkpoint is encrypted with the key {note.key_id[:200]!r}", url, hint)
        self._ready(url)
        key = self._find(note.key_id, url)
        if key.check != note.check:
            hint = "give the key that it was saved with"
            message = f"the checkpoint is encrypted with the key {note.key_id[:200]!r}, and another was given"
            raise WrongEncryptionKey(message, url, hint)
        return key

    def _ready(self, url: str) -> None:
        if self._left_behind:
            hint = "give encryption_key= a pathlib.Path or an importable function, or use async_save with threads"
            raise EncryptionKeyMissing("the encryption key did not travel to this process: no pickle has it", url, hint)

    def _find(self, key_id: str, url: str) -> MasterKey:
        if self._function is None:
            assert self._key is not None, "there is one"
            return self._key
        if key_id not in self._known:
            self._known[key_id] = self._asked(self._function, key_id, url)
        return self._known[key_id]

    def _asked(self, function: Callable[[str], bytes | str], key_id: str, url: str) -> MasterKey:
        try:
            return _master(function(key_id), "encryption_key=")
        except CkptCloudError:
            raise
        except Exception as error:
            message = f"encryption_key= gave no key for the id {key_id[:200]!r}: {type(error).__name__}"
            raise EncryptionKeyMissing(message, url, "its function is told the id that COMMIT names") from error


@dataclass(frozen=True, slots=True)
class Encryptions:
    """Keyring of what is read and of what is written from it.

    Attributes:
        decrypt: what is written is not encrypted.
    """

    source: Keyring
    target: Keyring
    decrypt: bool

    @classmethod
    def of(
        cls,
        source: EncryptionKey | Keyring | None,
        target: EncryptionKey | Keyring | None,
        target_id: str | None,
        *,
        decrypt: bool,
    ) -> Encryptions:
        """Those that were given; one for both where there is one.

        Raises:
            InvalidOption: both to encrypt and to decrypt.
        """
        written = Keyring.of(target, target_id)
        if decrypt and written:
            hint = "a key to decrypt with is source_encryption_key= (ckpt-cloud: --source-key-file)"
            raise InvalidOption("encryption_key= encrypts what is written, and decrypt= does not", hint=hint)
        return cls(written if source is None else Keyring.of(source), written, decrypt)

    def seal(self, register: Register) -> Seal | None:
        """What to seal with what is made of the checkpoint of `register`: as it was, unless told otherwise."""
        if self.target:
            return self.target.like(register).seal()
        return self.source.like(register).seal() if is_encrypted(register) and not self.decrypt else None


def _travels(function: Callable[..., object]) -> bool:
    """Whether a pickle names the function, or an object of the user's own class; others may have a key bound in."""
    kind: Any = type(function)
    if not (isinstance(function, FunctionType) or isinstance(kind.__call__, FunctionType)):
        return False
    try:
        pickle.dumps(function)
    except Exception:  # noqa: BLE001 - lambdas, closures and whatever else does not pickle
        return False
    return True


def is_encrypted(register: Register) -> bool:
    """Whether a checkpoint's objects are sealed."""
    return register.encryption is not UNSET


def _master(given: object, option: str) -> MasterKey:
    if isinstance(given, os.PathLike):
        given = _read(given, option)
    found = _decoded(given) if isinstance(given, str) else given
    if isinstance(found, bytes | bytearray | memoryview) and len(found) == KEY_BYTES:
        return MasterKey(bytes(found))
    # Locals may be shown beside a traceback.
    del given, found
    hint = "make one with: openssl rand -hex 32"
    message = f"{option} takes 32 bytes, or them in Base64 or hexadecimal digits, or a pathlib.Path, or a function"
    raise InvalidOption(message, hint=hint)


def _read(path: os.PathLike[str], option: str) -> bytes | str:
    """32 bytes as they are, else text."""
    try:
        with Path(path).open("rb") as file:
            content = file.read(_KEY_FILE_BYTES)
    except OSError as error:
        raise InvalidOption(f"{option}: the key file cannot be read ({error.strerror})") from None
    if len(content) == KEY_BYTES:
        return content
    return content.decode("ascii", "replace").strip()


def _decoded(text: str) -> bytes:
    """Hexadecimal digits or Base64, of either alphabet; nothing if it is neither."""
    try:
        if len(text) == 2 * KEY_BYTES:
            return bytes.fromhex(text)
        return base64.b64decode(text.replace("-", "+").replace("_", "/"), validate=True)
    except (ValueError, binascii.Error):
        return b""
