"""DCP's own `.metadata`, opened without running anything, as plain values.

Written by `FileSystemWriter`, `FsspecWriter`, s3torchconnector and others: a pickle of
`torch.distributed.checkpoint.metadata.Metadata`, whose storage data are `filesystem._StorageInfo`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ckpt_cloud.errors import CorruptFile
from ckpt_cloud.format.dtypes import SIZES
from ckpt_cloud.format.structure import MAX_DIMS
from ckpt_cloud.interop.contents import plain
from ckpt_cloud.interop.pickles import Record, load, ordered_class, record_class
from ckpt_cloud.planning.slices import Ints
from ckpt_cloud.tensors import dtype_of

_METADATA = "torch.distributed.checkpoint.metadata"
_CLASSES = (
    (_METADATA, "Metadata"),
    (_METADATA, "MetadataIndex"),
    (_METADATA, "TensorStorageMetadata"),
    (_METADATA, "BytesStorageMetadata"),
    (_METADATA, "ChunkStorageMetadata"),
    (_METADATA, "TensorProperties"),
    (_METADATA, "StorageMeta"),
    ("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
    ("torch.distributed.checkpoint._hf_utils", "_HFStorageInfo"),
)
_ENUMS = (
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"),
)
_PATHS = ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath", "Path", "PurePath")
_PATH_HOMES = ("pathlib", "pathlib._local")
_MEMORY_FORMATS = ("contiguous_format", "channels_last", "channels_last_3d", "preserve_format")


def as_sizes(value: Any) -> Ints:
    """What `torch.Size` makes of `value`."""
    return ints(value, "a size")


def _as_number(value: Any) -> int:
    """What an enumeration makes of `value`."""
    return plain(value, int, "a member of an enumeration")  # type: ignore[no-any-return]


def _as_text(value: Any) -> str:
    return plain(value, str, "a layout")  # type: ignore[no-any-return]


def names() -> dict[tuple[str, str], Any]:
    """What each name that DCP's metadata may hold stands for, made anew each time."""
    found: dict[tuple[str, str], Any] = {each: record_class(each[1]) for each in _CLASSES}
    found |= dict.fromkeys(_ENUMS, _as_number)
    found |= {("torch", name): name for name in (*SIZES, *_MEMORY_FORMATS, "strided")}
    found["torch", "Size"] = as_sizes
    found["torch.serialization", "_get_layout"] = _as_text
    for home in _PATH_HOMES:
        for name in _PATHS:
            found[home, name] = record_class(name)
    found["collections", "OrderedDict"] = ordered_class()
    for home in ("builtins", "__builtin__"):
        # Lists of what is in them: nothing that reading needs is a set.
        found[home, "set"] = found[home, "frozenset"] = list
    return found


class Stored:
    """`_StorageInfo`: where DCP wrote one chunk or item."""

    __slots__ = ("length", "offset", "path", "transforms")

    def __init__(self, record: Any, of: str) -> None:
        state = fields(record, "_StorageInfo", f"the storage of {of}")
        self.path: str = safe_path(plain(state.get("relative_path"), str, f"the file of {of}"), of)
        self.offset: int = plain(state.get("offset"), int, f"the offset of {of}")
        self.length: int = plain(state.get("length"), int, f"the length of {of}")
        transforms = state.get("transform_descriptors") or ()
        if not isinstance(transforms, list | tuple) or not all(type(name) is str for name in transforms):
            raise CorruptFile(f"the transforms of {of} should be names")
        self.transforms: tuple[str, ...] = tuple(transforms)


class ParsedMetadata:
    """The parts of `Metadata` that reading needs.

    Attributes:
        tensors: by key, dtype, shape, and offsets and sizes of the chunks.
        items: keys of everything else.
        storage: by key and offsets (None for items).
        paths: the planner's flatten mapping; None where there is none, or another planner's data.
    """

    def __init__(self, data: bytes, where: str) -> None:
        state = fields(load(data, names(), where), "Metadata", "the metadata")
        self.tensors: dict[str, tuple[torch.dtype, Ints, list[tuple[Ints, Ints]]]] = {}
        self.items: list[str] = []
        for fqn, entry in plain(state.get("state_dict_metadata"), dict, "the state dict's metadata").items():
            self._add(plain(fqn, str, "a key"), entry)
        self.storage: dict[tuple[str, Ints | None], Stored] = {}
        for index, stored in plain(state.get("storage_data"), dict, "the storage data").items():
            at = fields(index, "MetadataIndex", "an index")
            fqn = plain(at.get("fqn"), str, "a key")
            offset = at.get("offset")
            self.storage[fqn, None if offset is None else ints(offset, f"offsets of {fqn!r}")] = Stored(
                stored, repr(fqn)
            )
        self.paths = _paths(state.get("planner_data"))

    def _add(self, fqn: str, entry: Any) -> None:
        if type(entry).__name__ == "BytesStorageMetadata" and isinstance(entry, Record):
            self.items.append(fqn)
            return
        state = fields(entry, "TensorStorageMetadata", f"the metadata of {fqn!r}")
        chunks = []
        for chunk in plain(state.get("chunks"), list, f"the chunks of {fqn!r}"):
            box = fields(chunk, "ChunkStorageMetadata", f"a chunk of {fqn!r}")
            chunks.append(
                (ints(box.get("offsets"), f"offsets of {fqn!r}"), ints(box.get("sizes"), f"sizes of {fqn!r}"))
            )
        self.tensors[fqn] = (_dtype(state.get("properties"), fqn), ints(state.get("size"), f"shape of {fqn!r}"), chunks)


def fields(record: Any, kind: str, what: str) -> Mapping[str, Any]:
    """State of a record that should be of class `kind`.

    Raises:
        CorruptFile: it is something else.
    """
    if not isinstance(record, Record) or type(record).__name__ != kind:
        raise CorruptFile(f"{what} should be a {kind} and is a {type(record).__name__}")
    if record.state == ():
        return {}
    return plain(record.state, dict, f"the state of {what}")  # type: ignore[no-any-return]


def ints(value: Any, what: str) -> Ints:
    """A tuple, or list, of numbers that a size can be.

    Raises:
        CorruptFile: it is something else, or of more dimensions than a tensor has.
    """
    if not isinstance(value, tuple | list):
        raise CorruptFile(f"{what} should be sizes and is a {type(value).__name__}")
    if len(value) > MAX_DIMS:
        raise CorruptFile(f"{what} has {len(value)} dimensions, at most {MAX_DIMS} are possible")
    for number in value:
        # Not shown if it is anything else, which may be endlessly long.
        if type(number) is not int or not 0 <= number < 1 << 62:
            said = f"{number:.3e}" if type(number) is float else type(number).__name__
            raise CorruptFile(f"{what} should be sizes and holds {said}")
    return tuple(value)


def safe_path(path: str, of: str) -> str:
    """A file's path, if it stays inside the checkpoint.

    Raises:
        CorruptFile: it does not.
    """
    parts = path.split("/")
    odd = "\\" in path or any(char < " " or char == "\x7f" for char in path)
    if odd or any(part in ("", ".", "..") for part in parts):
        raise CorruptFile(f"{of} should lie in {path[:100]!r}, which is not a path inside the checkpoint")
    return path


def _dtype(properties: Any, fqn: str) -> torch.dtype:
    if not isinstance(properties, Record) or type(properties).__name__ != "TensorProperties":
        raise CorruptFile(f"{fqn!r} has no tensor properties")
    state = properties.state
    name = state.get("dtype") if isinstance(state, dict) else state[0] if isinstance(state, tuple) and state else None
    return dtype_of(plain(name, str, f"the dtype of {fqn!r}"))


def _paths(data: Any) -> dict[str, tuple[str | int, ...]] | None:
    if not isinstance(data, dict):
        return None
    for key, path in data.items():
        if type(key) is not str or type(path) is not tuple or not all(type(step) in (str, int) for step in path):
            return None
    return data
