"""Undoes coded chunks between a download and where their bytes belong.

fetched range ─► stored bytes of a unit, gathered if they lie in several ranges ─► plain bytes ─► boxes to the sink
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Protocol

from ckpt_cloud.errors import CorruptManifest, Unsupported
from ckpt_cloud.format import codec
from ckpt_cloud.planning.coded import Part, Placement, Unit
from ckpt_cloud.transfer.staging import Allocate


class Undo(Protocol):
    """Undoes stream transforms; called on worker threads."""

    def pieces(self, data: memoryview, transforms: Sequence[str], limit: int, name: str) -> Iterator[bytes]:
        """Plain bytes of `data`, which went through `transforms` in that order; an error if there are over `limit`."""
        ...


class Boxes(Protocol):
    """Where plain bytes go; called on worker threads, never twice for one box."""

    def memory(self, placement: Placement) -> memoryview | None:
        """The destination's own memory, if the placement's bytes lie there as they are stored; None if not."""
        ...

    def place(self, placements: Sequence[Placement], data: memoryview) -> None:
        """Copies the boxes of `placements` out of `data`."""
        ...

    def describe(self, placement: Placement | Part) -> str:
        """Name of what the placement is part of, for errors."""
        ...

    @property
    def allocate(self) -> Allocate:
        """Makes memory that `place` reads from fast."""
        ...


class Decoding:
    """A sink for ranges with coded chunks in them; all else it passes on as it is.

    Args:
        boxes: takes the plain bytes.
        undo: for streams of transforms.
        where: URL of the checkpoint, for errors.
    """

    def __init__(self, boxes: Boxes, undo: Undo, where: str) -> None:
        self._boxes = boxes
        self._undo = undo
        self._where = where
        self._lock = threading.Lock()
        # What has come of units that lie in several ranges, and how many bytes still lack.
        self._gathered: dict[Unit, tuple[bytearray, int]] = {}

    @property
    def allocate(self) -> Allocate:
        """As the boxes' own."""
        return self._boxes.allocate

    def memory(self, placement: Placement | Part) -> memoryview | None:
        """None for what must be undone."""
        return self._boxes.memory(placement) if isinstance(placement, Placement) else None

    def describe(self, placement: Placement | Part) -> str:
        """Name of what it is part of."""
        return self._boxes.describe(placement)

    def place(self, placements: Sequence[Placement | Part], data: memoryview) -> None:
        """Undoes what is coded, and passes everything on.

        Raises:
            CorruptManifest: it does not undo to as many bytes as the manifest says.
            Unsupported: there is nothing to undo it with.
        """
        plain = [placement for placement in placements if isinstance(placement, Placement)]
        if plain:
            self._boxes.place(plain, data)
        for part in placements:
            if isinstance(part, Part):
                stored = self._whole(part, data[part.source : part.end])
                if stored is not None:
                    self._settle(part.unit, stored)

    def _whole(self, part: Part, piece: memoryview) -> memoryview | None:
        """All stored bytes of the part's unit, once the last of them has come."""
        unit = part.unit
        if len(piece) == unit.stored:
            return piece
        with self._lock:
            begun = self._gathered.pop(unit, None)
            gathered, lacking = (bytearray(unit.stored), unit.stored) if begun is None else begun
            gathered[part.at : part.at + len(piece)] = piece
            if lacking > len(piece):
                self._gathered[unit] = gathered, lacking - len(piece)
                return None
        return memoryview(gathered)

    def _settle(self, unit: Unit, stored: memoryview) -> None:
        """Undoes a unit, and hands on its boxes."""
        # Where one destination takes all of it, no other memory is needed.
        only = unit.placements[0] if len(unit.placements) == 1 else None
        target = self._boxes.memory(only) if only is not None and only.end - only.source == unit.nbytes else None
        if target is not None:
            self._fill(unit, stored, target)
        elif unit.frames:
            plain = memoryview(self.allocate(unit.nbytes).data)
            self._fill(unit, stored, plain)
            self._boxes.place(unit.placements, plain)
        else:
            # Grows with what there is, whatever is claimed.
            gathered = bytearray()
            for piece in self._pieces(unit, stored):
                gathered += piece
            self._check(unit, len(gathered))
            self._boxes.place(unit.placements, memoryview(gathered))

    def _fill(self, unit: Unit, stored: memoryview, plain: memoryview) -> None:
        at = 0
        for piece in self._pieces(unit, stored):
            plain[at : at + len(piece)] = piece
            at += len(piece)
        self._check(unit, at)

    def _pieces(self, unit: Unit, stored: memoryview) -> Iterator[codec.Buffer]:
        """Plain bytes, never more than there should be."""
        if not unit.frames:
            yield from self._undo.pieces(stored, unit.codec, unit.nbytes, self._name(unit))
            return
        try:
            yield from codec.undone(stored, unit.frames)
        except codec.BadFrame as error:
            raise self._wrong(unit, str(error)) from None

    def _check(self, unit: Unit, nbytes: int) -> None:
        if nbytes != unit.nbytes:
            raise self._wrong(unit, f"it has {nbytes} bytes and should have {unit.nbytes}")

    def _name(self, unit: Unit) -> str:
        return self._boxes.describe(unit.placements[0])

    def _wrong(self, unit: Unit, why: str) -> CorruptManifest:
        message = f"what is stored of {self._name(unit)!r} does not undo to what the manifest says: {why}"
        return CorruptManifest(message, self._where, "it was damaged before it was stored; load an earlier checkpoint")


def check_codec(names: Sequence[str], *, framed: bool, name: str) -> None:
    """Refuses frames that cannot be undone here; streams are for whoever knows the transforms.

    Raises:
        Unsupported: names the codec.
    """
    if not framed:
        return
    if tuple(names) != (codec.ZSTD,):
        hint = "load it with a ckpt_cloud that knows it"
        raise Unsupported(f"{name!r} is compressed by {'+'.join(names)[:80]!r}, which is unknown here", hint=hint)
    if not codec.is_available():
        hint = "pip install 'ckpt-cloud[zstd]'"
        raise Unsupported(f"{name!r} is compressed by 'zstd', whose library zstandard is not installed", hint=hint)
