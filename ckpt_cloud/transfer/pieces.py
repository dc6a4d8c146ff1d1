"""Byte strings that are at hand, such as coded ones, as the source of a pack's upload."""

from __future__ import annotations

from collections.abc import Sequence

from ckpt_cloud.planning.save import Segment
from ckpt_cloud.transfer.staging import Allocate, plain_memory


class Pieces:
    """A source whose entries are the pieces."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._pieces = pieces

    @property
    def allocate(self) -> Allocate:
        """Memory of the process."""
        return plain_memory

    def view(self, entry: int) -> memoryview | None:
        """The piece."""
        return memoryview(self._pieces[entry])

    def lasts(self, entry: int) -> bool:
        """All are there already."""
        del entry
        return True

    def copy(self, segments: Sequence[Segment], into: memoryview) -> None:
        """Parts of pieces, one after another."""
        at = 0
        for segment in segments:
            size = segment.end - segment.start
            into[at : at + size] = memoryview(self._pieces[segment.entry])[segment.start : segment.end]
            at += size

    def release(self, entry: int) -> None:
        """They stay until the pack is stored, which may have to begin again."""
