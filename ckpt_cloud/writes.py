"""One rank's entries on their way to the store: packs of what is stored as it is, then of what is coded.

Batch ─┬► plain: packs planned at once ─► upload_packs ──┬► sealed if the save is encrypted ─► places, objects
       └► coded: packs of whatever size it comes to ─────┘
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch.distributed.checkpoint.planner import SavePlanner

from ckpt_cloud import garbage
from ckpt_cloud.batch import Batch
from ckpt_cloud.encryption import Seal
from ckpt_cloud.events import Recorder
from ckpt_cloud.format.codec import Zstd
from ckpt_cloud.format.manifest import ObjectEntry
from ckpt_cloud.format.sealing import sealed_size
from ckpt_cloud.metadata import Stored
from ckpt_cloud.options import TransferOptions
from ckpt_cloud.planning.save import plan_packs, shared_part_size
from ckpt_cloud.stores import ObjectStore
from ckpt_cloud.transfer.encode import upload_coded
from ckpt_cloud.transfer.upload import sizes_for, upload_packs
from ckpt_cloud.transforms import Transforms

_LEAST_COMPRESSED = 4 << 10
"""Bytes of what is worth a frame of its own; smaller chunks stay plain."""

Places = dict[int, Stored]
"""Where the entries of a batch came to lie, by entry."""


@dataclass(frozen=True, slots=True)
class Writes:
    """How one rank's part of one save is stored.

    Attributes:
        store: takes sealed objects as they come.
        attempt: id of the save.
        extensions: transforms that every entry goes through.
        seal: what encrypts it.
        new_key: of the rank's object of that number, which is about to be written.
    """

    store: ObjectStore
    attempt: str
    options: TransferOptions
    extensions: Transforms | None
    seal: Seal | None
    new_key: Callable[[int], str]
    recorder: Recorder

    async def run(self, batch: Batch, planner: SavePlanner) -> tuple[Places, list[ObjectEntry]]:
        """Stores all entries of a batch, those that are coded after all others."""
        coder = self._coder()
        least = 1 if self.extensions else _LEAST_COMPRESSED
        coded = [n for n, entry in enumerate(batch.entries) if coder is not None and entry.nbytes >= least]
        plain = sorted(set(range(len(batch.entries))) - set(coded))
        places, objects = await self._plain(batch, planner, plain, beside=sum(batch.entries[n].nbytes for n in coded))
        if coder is not None and coded:
            more_places, more = await self._coded(batch, planner, coded, coder, objects)
            places |= more_places
            objects += more
        return places, objects

    async def _plain(
        self, batch: Batch, planner: SavePlanner, numbers: Sequence[int], *, beside: int
    ) -> tuple[Places, list[ObjectEntry]]:
        """Entries `numbers` as they are; there are `beside` further bytes to come."""
        entries = [batch.entries[number] for number in numbers]
        options = self._sized_for(sum(entry.nbytes for entry in entries))
        with garbage.paused():
            sizes = sizes_for(self.store, options, sealed=self.seal is not None)
            packs = plan_packs(entries, self.attempt, sizes)
        named = [(self.new_key(number), pack) for number, pack in enumerate(packs)]
        stored = sum(sealed_size(pack.size) if self.seal else pack.size for pack in packs)
        self.recorder.expect("write", "up", stored + beside)
        objects = await upload_packs(
            self.store,
            batch.source(planner, numbers),
            named,
            [entry.nbytes for entry in entries],
            options=options,
            recorder=self.recorder,
            seal=self.seal.of_object if self.seal else None,
        )
        with garbage.paused():
            places = {
                numbers[entry]: Stored(None, number, start, entries[entry].nbytes)
                for number, pack in enumerate(packs)
                for entry, start in zip(pack.entries, pack.starts, strict=True)
            }
        return places, objects

    def _sized_for(self, total: int) -> TransferOptions:
        """The options with parts that suit so many bytes."""
        given = self.options
        part_size = shared_part_size(total, most=given.part_size, requests=given.max_requests, block=given.block_size)
        return replace(given, part_size=part_size)

    async def _coded(
        self,
        batch: Batch,
        planner: SavePlanner,
        numbers: Sequence[int],
        coder: Transforms | Zstd,
        stored: Sequence[ObjectEntry],
    ) -> tuple[Places, list[ObjectEntry]]:
        """Entries `numbers` in objects of their own, which come after those that are stored."""
        entries = [batch.entries[number] for number in numbers]
        beside = sum(sealed_size(entry.size) if self.seal else entry.size for entry in stored)
        found, objects = await upload_coded(
            self.store,
            batch.source(planner, numbers),
            entries,
            coder,
            attempt=self.attempt,
            new_key=lambda number: self.new_key(len(stored) + number),
            options=self.options,
            recorder=self.recorder,
            expect=lambda nbytes: self.recorder.resize("write", beside + nbytes),
            seal=self.seal.of_object if self.seal else None,
        )
        places = {
            number: Stored(None, -1, 0, entry.nbytes, coded=each.moved(len(stored)))
            for number, entry, each in zip(numbers, entries, found, strict=True)
        }
        return places, objects

    def _coder(self) -> Transforms | Zstd | None:
        """What entries are coded by."""
        if self.extensions:
            return self.extensions
        return Zstd(self.options.frame_size, self.options.compression_level) if self.options.compression else None
