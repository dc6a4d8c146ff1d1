"""Keys of a checkpoint, relative to its URL, and the time-ordered ids that make data keys unique.

COMMIT                        the register, the one commit point
data/<id>/manifest            written by the coordinator
data/<id>/<n>.safetensors     pack objects, under an id that each rank mints for each save
data/<hash>-<id>/<n>.safetensors   the same, spread over many prefixes
"""

from __future__ import annotations

import hashlib
import re

from ckpt_cloud.errors import CorruptManifest

COMMIT_KEY = "COMMIT"
DATA_PREFIX = "data/"
PROBE = "probe"
"""Name under an id of a throw-away object by which a writer finds out what its store can do."""
NO_ID = "0" * 32
"""Sorts before every id: the fence of a register that fences nothing off."""

_ID = re.compile(r"[0-9a-f]{32}")
_KEY = re.compile(r"data/([0-9a-f]{32}/manifest|([0-9a-f]{1,4}-)?[0-9a-f]{32}/[0-9]{1,9}\.safetensors)")
_RANK = re.compile(r"rank-[0-9]{5,}")
_BELOW_ID = re.compile(r"(?:(.*)/)?data/(?:[0-9a-f]{1,4}-)?([0-9a-f]{32})/.+", re.DOTALL)


def mint_id(unix_ms: int, random_bytes: bytes) -> str:
    """A UUIDv7 (RFC 9562, section 5.7) as 32 hexadecimal digits, so that text order is time order.

    Args:
        unix_ms: milliseconds since 1970.
        random_bytes: 10 bytes of which 74 bits are used.
    """
    bits = int.from_bytes(random_bytes[:10], "big")
    value = (unix_ms & (1 << 48) - 1) << 80 | 0x7 << 76 | (bits >> 62 & 0xFFF) << 64 | 0b10 << 62 | bits & (1 << 62) - 1
    return f"{value:032x}"


def first_id(unix_ms: int) -> str:
    """Sorts before every id that is minted from this moment on, and after all that were before it."""
    return f"{max(0, unix_ms):012x}" + "0" * 20


def next_id(id_: str) -> str:
    """Sorts right after `id_`."""
    return f"{int(id_, 16) + 1:032x}"


def is_id(text: str) -> bool:
    """Whether `text` has the form of an id."""
    return _ID.fullmatch(text) is not None


def id_unix_ms(id_: str) -> int:
    """Milliseconds since 1970 at which an id was minted."""
    return int(id_[:12], 16)


def pack_key(id_: str, number: int, *, spread: int = 0) -> str:
    """Key of the `number`th pack object that the holder of `id_` writes.

    Args:
        spread: hexadecimal digits, 0 to 4, of a hash before the id. Ids of one moment begin alike, so without them all
            objects of a save fall into one range of keys, and a store that limits requests per range slows it down.
    """
    digits = hashlib.sha256(f"{id_}/{number}".encode()).hexdigest()[:spread]
    return f"{DATA_PREFIX}{digits}{'-' if digits else ''}{id_}/{number}.safetensors"


def manifest_key(id_: str) -> str:
    """Key of the manifest of the save whose coordinator minted `id_`."""
    return f"{DATA_PREFIX}{id_}/manifest"


def rank_path(rank: int) -> str:
    """Where rank `rank` keeps its own checkpoint, under the common URL."""
    return f"rank-{rank:05d}"


def is_rank_path(name: str) -> bool:
    """Whether `name` is one that `rank_path` gives, and no other checkpoint that somebody called alike."""
    return _RANK.fullmatch(name) is not None


def is_key(text: str) -> bool:
    """Whether `text` is a key that this format writes."""
    return _KEY.fullmatch(text) is not None


def names_a_key(path: str) -> bool:
    """Whether the last segments of `path` are a key that this format writes, `COMMIT` included."""
    segments = path.split("/")
    return segments[-1] == COMMIT_KEY or is_key("/".join(segments[-3:]))


def check_key(key: str) -> str:
    """`key`, if it is one that this format writes; keys from storage are never used unchecked.

    Raises:
        CorruptManifest: anything else, such as an absolute key, another URL, `..` or an empty name.
    """
    if not is_key(key):
        raise CorruptManifest(f"the manifest names {key[:200]!r}, which is not a key of this checkpoint")
    return key


def place_of(path: str) -> tuple[str, str] | None:
    """The checkpoint's path and the id, or "" for `COMMIT`, of an object below a root; None if it is none of ours.

    All below `data/<id>/` belongs to the id, whether this version knows what it is or not.
    """
    if path == COMMIT_KEY or path.endswith(f"/{COMMIT_KEY}"):
        return path.removesuffix(COMMIT_KEY).rstrip("/"), ""
    found = _BELOW_ID.fullmatch(path)
    return (found[1] or "", found[2]) if found else None


def join(prefix: str, key: str) -> str:
    """`key` under `prefix`, which has no slash at its end and may be empty."""
    return f"{prefix}/{key}" if prefix else key
