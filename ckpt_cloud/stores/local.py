"""Local directories, with what obstore's local store lacks: replacing one exact version, and durability."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import obstore

from ckpt_cloud.errors import AlreadyExists, PreconditionFailed
from ckpt_cloud.format.layout import join, names_a_key
from ckpt_cloud.stores.base import ANY, Buffer, Condition, Replace, Source, UnfinishedUpload
from ckpt_cloud.stores.foreign_errors import translated
from ckpt_cloud.stores.native import Clients, NativeStore
from ckpt_cloud.workers import in_thread


class LocalStore(NativeStore):
    """Files under a directory; what is acknowledged has been synced to the disk."""

    def __init__(self, store: object, root: Path, url: str) -> None:
        super().__init__(Clients.same(store), str(root).lstrip("/"), url)
        self._root = root

    async def put(self, key: str, data: Buffer, condition: Condition = ANY) -> str | None:
        if condition is not ANY:
            return await in_thread(self._put_if, key, data, condition)
        version = await super().put(key, data)
        await in_thread(_sync, self._root / key, self._root)
        return version

    async def put_multipart(self, key: str, source: Source, *, part_size: int, concurrency: int) -> str | None:
        version = await super().put_multipart(key, source, part_size=part_size, concurrency=concurrency)
        await in_thread(_sync, self._root / key, self._root)
        return version

    async def list_children(self, prefix: str = "") -> Sequence[str]:
        below = self._root / prefix
        return [name for name in await super().list_children(prefix) if await in_thread(_has_files, below / name)]

    async def delete(self, keys: Sequence[str]) -> None:
        await super().delete(keys)
        await in_thread(_prune, [self._root / key for key in keys], self._root)

    async def list_uploads(self, prefix: str = "") -> Sequence[UnfinishedUpload]:
        """Temporary files that a writer which died left beside the names that they were to get."""
        return await in_thread(lambda: list(_drafts(self._root, prefix)))

    async def abort_upload(self, upload: UnfinishedUpload) -> None:
        await in_thread(self._remove_draft, upload)

    def _remove_draft(self, upload: UnfinishedUpload) -> None:
        path = self._root / f"{upload.key}#{upload.id}"
        with translated("abort upload", self._at(upload.key)):
            path.unlink(missing_ok=True)
        _prune([path], self._root)

    def _put_if(self, key: str, data: Buffer, condition: Condition) -> str | None:
        """Gives a file that is already on the disk its name, if the condition holds; never a name without its bytes."""
        path = self._root / key
        with translated("put", self._at(key)):
            if isinstance(condition, Replace):
                self._check(condition, key)
            path.parent.mkdir(parents=True, exist_ok=True)
            # obstore leaves names like this out of listings, as it does with drafts of its own.
            draft = path.with_name(f"{path.name}#{int.from_bytes(os.urandom(4), 'big')}")
            try:
                with draft.open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                with _locked(path.parent):
                    self._publish(draft, path, condition, key)
                _sync(path.parent, self._root)
                return self._version_of(key)
            finally:
                draft.unlink(missing_ok=True)

    def _publish(self, draft: Path, path: Path, condition: Condition, key: str) -> None:
        """Under the lock that every writer of this library takes; a create is atomic even without it."""
        if isinstance(condition, Replace):
            self._check(condition, key)
            draft.replace(path)
            return
        try:
            path.hardlink_to(draft)
        except FileExistsError:
            raise AlreadyExists("put: an object is already there", self._at(key)) from None

    def _check(self, condition: Replace, key: str) -> None:
        if self._version_of(key) != condition.version:
            raise PreconditionFailed("put: the object is another version, or gone", self._at(key))

    def _version_of(self, key: str) -> str | None:
        try:
            return obstore.head(self._clients.once, join(self._prefix, key))["e_tag"]
        except FileNotFoundError:
            return None


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _drafts(root: Path, prefix: str) -> Iterator[UnfinishedUpload]:
    """Only of names that this library writes: the directory may hold anybody's files."""
    for path in (root / prefix).rglob("*#*"):
        key, _, number = path.relative_to(root).as_posix().rpartition("#")
        if number.isdigit() and names_a_key(key):
            try:
                yield UnfinishedUpload(key, number, path.stat().st_mtime)
            except FileNotFoundError:
                continue


def _has_files(directory: Path) -> bool:
    return any(files for _, _, files in os.walk(directory))


def _prune(paths: Sequence[Path], root: Path) -> None:
    """Removes directories below `root` that held `paths` and are empty now; an object store has none."""
    for path in paths:
        for directory in path.parents:
            if directory == root:
                break
            try:
                directory.rmdir()
            except OSError:
                break


def _sync(path: Path, root: Path) -> None:
    """Syncs a file, or a directory, and the directories that name it, up to `root`'s own name."""
    for target in (path, *path.parents):
        handle = os.open(target, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        if target == root.parent:
            return
