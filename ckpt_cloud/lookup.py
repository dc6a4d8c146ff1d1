"""A manifest, or a few entries of it: its root, the pages that have them, and the pages of their objects."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from ckpt_cloud import commit
from ckpt_cloud.commit import NO_KEYS
from ckpt_cloud.encryption import Keyring
from ckpt_cloud.errors import CorruptManifest, DecryptionFailed, NotFound, RangeNotSatisfiable, SignatureError
from ckpt_cloud.format import manifest as manifests
from ckpt_cloud.format.layout import check_key
from ckpt_cloud.format.pages import Page, Root, check_page, decode_root, page_of
from ckpt_cloud.format.register import ManifestRef, Register
from ckpt_cloud.stores import ObjectStore

Accept = Callable[[Register, str], None]


@dataclass(frozen=True, slots=True)
class Opened:
    """A checkpoint as one rank found it, small enough to be sent to the others.

    Attributes:
        reference: of `data`, which is the manifest or a part of it.
    """

    reference: ManifestRef
    data: bytes
    register: Register


async def open_whole(store: ObjectStore, accept: Accept | None, encryption: Keyring = NO_KEYS) -> Opened:
    """The whole manifest.

    Raises:
        As `commit.open_manifest`.
    """
    register, data = await commit.open_manifest(store, accept, encryption)
    assert register.manifest is not None, "it is committed"
    return Opened(register.manifest, data, register)


async def open_part(
    store: ObjectStore, keys: Collection[str], accept: Accept | None, encryption: Keyring = NO_KEYS
) -> Opened:
    """A manifest with the tensors and items `keys` alone; those that are not there lack.

    Of a manifest of a million chunks it fetches some hundred KiB for a tensor.

    Raises:
        As `commit.open_manifest`.
    """
    try:
        return await _open_part(store, keys, accept, encryption)
    except (CorruptManifest, DecryptionFailed, SignatureError):
        # A bit that flipped on the way is right the second time.
        return await _open_part(store, keys, accept, encryption)


async def _open_part(store: ObjectStore, keys: Collection[str], accept: Accept | None, encryption: Keyring) -> Opened:
    register, reference = await commit.committed(store, accept)
    unsealed = await encryption.unsealed(store, register)
    if not reference.root:
        return Opened(reference, await commit.read_manifest(unsealed, reference), register)
    where = _Pages(unsealed, reference)
    root = await where.root()
    tensors = await where.fetch(page_of(root.tensors, key) for key in keys)
    items = await where.fetch(page_of(root.items, key) for key in keys)
    found: dict[str, manifests.TensorEntry] = {}
    for page in tensors.values():
        found |= {name: entry for name, entry in manifests.decode_tensors(page).items() if name in keys}
    stored = manifests.decode_items(items.values(), keys)
    numbers = manifests.objects_of(found, stored)
    objects = await where.fetch(page_of(root.objects, number) for number in numbers)
    part = manifests.part(root, found, stored, [(page.first, data) for page, data in objects.items()], where.url)
    data = manifests.encode(part)
    return Opened(manifests.reference(reference.key, data), data, register)


class _Pages:
    """The pages of one manifest."""

    def __init__(self, store: ObjectStore, reference: ManifestRef) -> None:
        self.url = f"{store.url}/{reference.key}"
        self._store = store
        self._reference = reference

    async def root(self) -> Root:
        """Checked against what `COMMIT` says of it."""
        reference = self._reference
        data = await self._read(reference.size - reference.root, reference.size)
        if hashlib.sha256(data).hexdigest() != reference.sha256:
            raise CorruptManifest("the manifest's root is not the one that COMMIT names", self.url)
        return decode_root(data, reference.size)

    async def fetch(self, pages: Iterable[Page | None]) -> dict[Page, memoryview]:
        """The bytes of each page, checked against the root."""
        wanted = sorted({page for page in pages if page is not None}, key=lambda page: page.start)
        bodies = await asyncio.gather(*(self._read(page.start, page.start + page.size) for page in wanted))
        for page, data in zip(wanted, bodies, strict=True):
            check_page(page, data)
        return dict(zip(wanted, bodies, strict=True))

    async def _read(self, start: int, end: int) -> memoryview:
        try:
            return await self._store.get_range(check_key(self._reference.key), start, end)
        except (NotFound, RangeNotSatisfiable):
            raise CorruptManifest("the manifest that COMMIT names is gone, or was cut short", self.url) from None
