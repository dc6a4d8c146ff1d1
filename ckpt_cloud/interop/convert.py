"""`ckpt_cloud.convert`: from any format to any other, in fixed memory."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch.distributed.checkpoint._extension import ExtensionRegistry
from torch.distributed.checkpoint._nested_dict import unflatten_state_dict

from ckpt_cloud import bridge
from ckpt_cloud.encryption import EncryptionKey, Encryptions, Keyring, is_encrypted
from ckpt_cloud.errors import CheckpointExists, CkptCloudError, InvalidOption, InvalidURL
from ckpt_cloud.events import Recorder
from ckpt_cloud.format.layout import COMMIT_KEY
from ckpt_cloud.interop.any_format import AnyReader, reader_for
from ckpt_cloud.interop.consolidate import Consolidation
from ckpt_cloud.interop.contents import Contents
from ckpt_cloud.interop.dcp_files import METADATA_KEY
from ckpt_cloud.interop.dcp_layout import DcpLayout, file_number
from ckpt_cloud.interop.objects import Data, ObjectPlan, ObjectUploader
from ckpt_cloud.interop.own_format import ITEMS_AT_ONCE, OwnFormat
from ckpt_cloud.interop.pull import Puller, opened_item
from ckpt_cloud.interop.reader import ForeignReader
from ckpt_cloud.interop.repository import Repository, is_there
from ckpt_cloud.interop.safetensors_files import INDEX_KEY, SINGLE_KEY, SUFFIX
from ckpt_cloud.interop.safetensors_layout import MAX_SHARD_BYTES, check_types, file_plan, index, split
from ckpt_cloud.interop.torch_layout import Placeholder, layout
from ckpt_cloud.options import StoreOptions, TransferOptions
from ckpt_cloud.reader import ObjectStoreReader
from ckpt_cloud.session import Settings
from ckpt_cloud.signing import TrustedKey
from ckpt_cloud.stores import ObjectStore, open_store, parse_url
from ckpt_cloud.stores.compose import open_composer

Format = Literal["ckpt-cloud", "dcp", "safetensors", "torch"]
FORMATS: tuple[Format, ...] = ("ckpt-cloud", "dcp", "safetensors", "torch")


@dataclass(frozen=True, slots=True)
class Converted:
    """What a conversion did.

    Attributes:
        source_format: that was found.
        tensors, items: how many were written.
        left_out: keys of items that the new format has no place for.
        bytes_read, bytes_written: data over the line.
        bytes_copied: by the store itself, on its own side.
        objects: written.
        seconds: that it took.
    """

    source_format: str
    tensors: int
    items: int
    left_out: list[str]
    bytes_read: int
    bytes_written: int
    objects: int
    seconds: float
    bytes_copied: int = 0


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    to: Format,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    dequantize: torch.dtype | None = None,
    block_size: int = 128,
    extensions: ExtensionRegistry | None = None,
    trust: bool = False,
    source_store: StoreOptions | None = None,
    destination_store: StoreOptions | None = None,
    transfer: TransferOptions | None = None,
    source_encryption_key: EncryptionKey | Keyring | None = None,
    encryption_key: EncryptionKey | Keyring | None = None,
    encryption_key_id: str | None = None,
    decrypt: bool = False,
    trusted_keys: TrustedKey | Iterable[TrustedKey] | None = None,
    require_signature: bool | None = None,
    require_encryption: bool | None = None,
) -> Converted:
    """Writes the checkpoint at `source` to `destination` in another format, or the same.

    Tensors stream through in windows: memory stays the same however large the checkpoint is. Neither end needs a
    process group, a GPU or a local disk.

    Args:
        source: URL of a checkpoint of any format that `ckpt_cloud.open` reads.
        destination: URL; of a file for `torch` and, if it ends in `.safetensors`, for `safetensors`.
        to: `ckpt-cloud`; `dcp`, which DCP's own readers open; `safetensors`, a Hugging Face model repository, or one
            file; `torch`, a file for `torch.load`.
        overwrite: replace what is at `destination`, which stays until the new one is whole; but for a repository of
            as many safetensors files, which are replaced one by one.
        max_shard_bytes: of one safetensors file; default 5 GB, as Hugging Face's libraries.
        dequantize, block_size, extensions, trust: as for `ckpt_cloud.open`.
        source_store, destination_store: as `store` of `ObjectStoreReader` and `ObjectStoreWriter`.
        transfer: of both.
        source_encryption_key, encryption_key, encryption_key_id, decrypt: as for `copy`. Only `ckpt-cloud` can be
            encrypted: an encrypted checkpoint is written in another format only with `decrypt`.
        trusted_keys, require_signature, require_encryption: what to demand of the source, as for `ckpt_cloud.open`.

    Returns:
        What was read, written and left out. Safetensors holds no items but tensors: their keys are `left_out`.

    Raises:
        CheckpointExists: something is at `destination`, and `overwrite` is off.
        InvalidOption: the new format cannot be encrypted, without `decrypt`; the source's files would be replaced.
        UnsupportedTensor: elements that the new format has no name for; nothing was written.
        Whatever opening and reading `source`, or writing, raises; what was written is deleted if possible.
    """
    if to not in FORMATS:
        raise InvalidOption(f"to is {to!r}; it is one of {', '.join(FORMATS)}")
    began = time.monotonic()
    keys = Encryptions.of(source_encryption_key, encryption_key, encryption_key_id, decrypt=decrypt)
    # Locals may be shown beside a traceback.
    del source_encryption_key, encryption_key
    given = {"store": source_store, "transfer": transfer, "trust": trust}
    foreign = {"dequantize": dequantize, "block_size": block_size, "extensions": extensions}
    demands = {"trusted_keys": trusted_keys, "require_signature": require_signature}
    demands["require_encryption"] = require_encryption or None
    reader = reader_for(source, given, foreign, demands, own={"encryption_key": keys.source})
    options, puller = Settings.of(destination_store, transfer, None, None, {}), Puller(reader)
    target, sources = _target_keys(reader, keys, to), _files_of(reader, source_store)
    work = _Conversion(puller, os.fspath(destination), options, overwrite, target, sources)
    if isinstance(reader, ForeignReader) and source_store == destination_store:
        work.shards = reader.shards
    report = work.write(to, max_shard_bytes).report
    return Converted(
        getattr(reader, "format", "") or "ckpt-cloud",
        len(work.puller.tensors),
        len(work.puller.items) - len(work.left_out),
        work.left_out,
        _read(reader),
        report.bytes_moved,
        report.objects,
        time.monotonic() - began,
        work.bytes_copied,
    )


def _target_keys(reader: AnyReader, keys: Encryptions, to: Format) -> Keyring:
    """With what to encrypt what is written.

    Raises:
        InvalidOption: it ought to be encrypted, and cannot be.
    """
    register = reader.register if isinstance(reader, ObjectStoreReader) else None
    secret = register is not None and is_encrypted(register) and not keys.decrypt
    if to != "ckpt-cloud" and (secret or keys.target):
        hint = "pass decrypt=True (--decrypt) to write it in clear, with source_encryption_key= for the source"
        raise InvalidOption(f"the format {to} cannot be encrypted", hint=hint)
    if register is None or not secret:
        return keys.target
    return (keys.target or keys.source).like(register)


def _files_of(reader: AnyReader, store: StoreOptions | None) -> set[tuple[str | None, str]]:
    """Endpoint and URL of every file that is read from, of other formats than ours."""
    if isinstance(reader, ObjectStoreReader):
        return set()
    endpoint = store.endpoint_url if store else None
    return {(endpoint, url) for url in reader.files}


def _read(reader: AnyReader) -> int:
    return reader.report.bytes_moved


@dataclass(slots=True)
class _Conversion:
    """One conversion: the opened source, and where it goes."""

    puller: Puller
    destination: str
    settings: Settings
    overwrite: bool
    keyring: Keyring
    sources: set[tuple[str | None, str]]
    shards: Contents | None = None
    """Of the source, if the store might copy them."""
    bytes_copied: int = 0
    left_out: list[str] = field(default_factory=list)
    recorder: Recorder = field(default_factory=Recorder)
    written: list[str] = field(default_factory=list)
    kept: set[str] = field(default_factory=set)

    def write(self, to: Format, max_shard_bytes: int) -> Recorder:
        if to == "safetensors":
            return self.to_safetensors(max_shard_bytes)
        return {"ckpt-cloud": self.to_own, "dcp": self.to_dcp, "torch": self.to_torch}[to]()

    def to_own(self) -> Recorder:
        options = {
            "overwrite": self.overwrite,
            "store": self.settings.store,
            "transfer": self.settings.transfer,
            "encryption_key": self.keyring,
        }
        work = OwnFormat(self.puller, self.destination, options)
        work.write()
        for writer in work.writers:
            self.recorder.report.bytes_moved += writer.report.bytes_moved
            self.recorder.report.objects += writer.report.objects
        return self.recorder

    def to_dcp(self) -> Recorder:
        store = self._store(self.destination)
        there = self._claim(store, METADATA_KEY)
        # What is replaced stays whole until the new metadata are there: new files have other names.
        old = bridge.run(_dcp_files(store)) if there else {}
        first = max(old.values(), default=-1) + 1
        told = DcpLayout(self.puller.tensors, self.puller.metadata.planner_data, store.url, first=first)
        with self._cleaned(store):
            for plan in told.files():
                self._upload(store, plan)
            for at in range(0, len(self.puller.items), ITEMS_AT_ONCE):
                self._put(store, *told.add_items(self._items(at)))
            self._put_last(store, METADATA_KEY, told.metadata(), replaced=there)
        if old:
            with contextlib.suppress(CkptCloudError):
                bridge.run(store.delete(sorted(old)))
        return self.recorder

    def to_safetensors(self, max_shard_bytes: int) -> Recorder:
        tensors = self.puller.tensors
        check_types(tensors, self.destination)
        self.left_out = list(self.puller.items)
        if self.destination.endswith(SUFFIX):
            return self._to_file(lambda name: file_plan(name, tensors, list(tensors)), copies=True)
        store = self._store(self.destination)
        self._claim(store)
        replaced = Repository(store)
        replaced.claim(overwrite=self.overwrite)
        files = split(tensors, max_shard_bytes, None)
        single = list(files) == [SINGLE_KEY]
        self._check_sources(store, files)
        replaced.begin(files)
        self.kept |= replaced.old & {SINGLE_KEY}
        with self._cleaned(store):
            for name, fqns in files.items():
                self._copy(store, file_plan(name, tensors, fqns))
            if not single:
                self._put_last(store, INDEX_KEY, index(files, tensors), replaced=INDEX_KEY in replaced.old)
        replaced.end(files if single else [INDEX_KEY, *files])
        return self.recorder

    def _check_sources(self, store: ObjectStore, files: Collection[str]) -> None:
        """Refuses to replace what is still to be read, file by file; a single one is replaced at once, at the end."""
        endpoint = self.settings.store.endpoint_url
        if len(files) > 1 and any((endpoint, f"{store.url}/{name}") in self.sources for name in files):
            hint = "choose another destination"
            raise InvalidOption(f"files of the source would be replaced while they are read ({store.url})", hint=hint)

    def to_torch(self) -> Recorder:
        state: dict[str, Any] = {
            fqn: Placeholder(Data(fqn, entry.properties.dtype, (0,) * len(entry.size), tuple(entry.size)))
            for fqn, entry in self.puller.tensors.items()
        }
        for at in range(0, len(self.puller.items), ITEMS_AT_ONCE):
            state |= {fqn: opened_item(value) for fqn, value in self._items(at).items()}
        paths = self.puller.metadata.planner_data
        if isinstance(paths, Mapping) and all(fqn in paths for fqn in state):
            state = unflatten_state_dict(state, dict(paths))
        return self._to_file(lambda name: ObjectPlan(name, *layout(state)))

    def _to_file(self, plan: Callable[[str], ObjectPlan], *, copies: bool = False) -> Recorder:
        location = parse_url(self.destination)
        folder, _, name = location.path.rpartition("/")
        if not name:
            raise InvalidURL("the destination should be a file", self.destination, "add a name, such as model.pt")
        store = self._store(replace(location, path=folder).url)
        if self._claim(store, name):
            # Replaced at once, or not at all.
            self.kept.add(name)
        with self._cleaned(store):
            (self._copy if copies else self._upload)(store, plan(name))
        return self.recorder

    def _store(self, url: str) -> ObjectStore:
        return open_store(parse_url(url), self.settings.store)

    def _claim(self, store: ObjectStore, key: str | None = None) -> bool:
        """Whether `key` is there, to be replaced; refused unless that is wanted.

        Raises:
            CheckpointExists: it is, or a checkpoint of ours, which is never mixed with another format.
        """
        if bridge.run(is_there(store, COMMIT_KEY)):
            raise CheckpointExists(f"{COMMIT_KEY} is already there", store.url, "choose another URL")
        if key is None or not bridge.run(is_there(store, key)):
            return False
        if not self.overwrite:
            hint = "choose another URL, or pass overwrite=True (--overwrite)"
            raise CheckpointExists(f"{key} is already there", store.url, hint)
        return True

    def _upload(self, store: ObjectStore, plan: ObjectPlan) -> None:
        self.written.append(plan.key)
        bridge.run(self._uploader(store).upload(plan))

    def _copy(self, store: ObjectStore, plan: ObjectPlan) -> None:
        """Writes a safetensors file: where the tensors are in others of the same store, by its own copies if it can."""
        source = parse_url(self.shards.under) if self.shards else None
        location = parse_url(store.url)
        composer = open_composer(location, self.settings.store, source) if source else None
        if source is None or self.shards is None or composer is None:
            self._upload(store, plan)
            return
        self.written.append(plan.key)
        shards = open_store(source, self.settings.store)
        work = Consolidation(self.shards, self.puller, self._uploader(store), composer, source=shards, store=store)
        bridge.run(work.write(plan))
        self.bytes_copied += work.copied_bytes
        self.recorder.report.objects += work.composed

    def _uploader(self, store: ObjectStore) -> ObjectUploader:
        return ObjectUploader(store, self.puller, self.settings.transfer, self.recorder)

    def _put(self, store: ObjectStore, key: str, content: bytes) -> None:
        self.written.append(key)
        bridge.run(store.put(key, content))
        self.recorder.moved("up", key, len(content))
        self.recorder.report.objects += 1

    def _put_last(self, store: ObjectStore, key: str, content: bytes, *, replaced: bool) -> None:
        """Puts what makes all the rest visible."""
        if replaced:
            # If it is not clear whether it was stored, either the old one is there or the new: both must be whole.
            self.written.clear()
            self.kept.add(key)
        self._put(store, key, content)

    @contextlib.contextmanager
    def _cleaned(self, store: ObjectStore) -> Iterator[None]:
        """Deletes what was written if anything fails, as far as the store lets it; what was there before stays."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(CkptCloudError):
                bridge.run(store.delete([key for key in self.written if key not in self.kept]))
            raise

    def _items(self, at: int) -> dict[str, bytes]:
        return self.puller.pull_items(self.puller.items[at : at + ITEMS_AT_ONCE])


async def _dcp_files(store: ObjectStore) -> dict[str, int]:
    """Numbers of the `.distcp` files right under the store's URL, by key."""
    numbers = {info.key: file_number(info.key) async for info in store.list()}
    return {key: number for key, number in numbers.items() if number is not None}
