"""Stream transforms of DCP's extensions, such as its `ZStandard`: done on the way out, undone on the way in."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

from torch.distributed.checkpoint._extension import ExtensionRegistry, StreamTransformExtension

from ckpt_cloud.errors import CkptCloudError, CorruptManifest, Damaged, InvalidOption, Unsupported

_READ_BYTES = 1 << 20


class Transforms:
    """What a writer does to each chunk, as one stream.

    Args:
        extensions: as DCP's `FileSystemWriter` takes them: the last given is the first that bytes go through.

    Raises:
        InvalidOption: one is no stream transform.
    """

    frame = 0

    def __init__(self, extensions: Sequence[StreamTransformExtension]) -> None:
        given: tuple[Any, ...] = tuple(extensions)
        for each in given:
            if not isinstance(each, StreamTransformExtension):
                hint = "give instances of torch.distributed.checkpoint's stream transforms, such as ZStandard()"
                raise InvalidOption(f"extensions has a {type(each).__name__}", hint=hint)
        self._extensions: tuple[StreamTransformExtension, ...] = given
        self.codec = tuple(each.get_descriptor() for each in reversed(self._extensions))

    def stream(self, write: Callable[[bytes], None]) -> IO[bytes]:
        """What takes plain bytes, and hands what becomes of them to `write`; all of it once it is closed."""
        stream: Any = _Output(write)
        for each in self._extensions:
            stream = each.transform_to(stream)
        return stream  # type: ignore[no-any-return]


class _Output(io.RawIOBase):
    """The end of the transforms."""

    def __init__(self, write: Callable[[bytes], None]) -> None:
        self._write = write

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        """Copied, since the transform may use its buffer again."""
        piece = bytes(data)
        if piece:
            self._write(piece)
        return len(piece)


class _Input(io.RawIOBase):
    """Reads memory without a copy of it."""

    def __init__(self, data: memoryview) -> None:
        self._data = data

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int:
        piece = self._data[: len(into)]
        into[: len(piece)] = piece
        self._data = self._data[len(piece) :]
        return len(piece)


class Undo:
    """Takes back what DCP's extensions did on the way out.

    Args:
        registry: knows the extensions; DCP's own by default.
        reader: class that a registry is to be given to, for messages.
        damaged: raised when something else comes out than should.
    """

    def __init__(
        self,
        registry: ExtensionRegistry | None,
        *,
        reader: str = "ObjectStoreReader",
        damaged: type[Damaged] = CorruptManifest,
    ) -> None:
        self._registry = registry or ExtensionRegistry()
        self._reader = reader
        self._damaged = damaged

    def __call__(self, data: memoryview, transforms: Sequence[str], limit: int, name: str) -> bytes | memoryview:
        """`data` as it was before, at most `limit` bytes.

        Args:
            transforms: descriptors, in the order in which they were applied.

        Raises:
            Unsupported: an extension is not known, or its library is missing.
            Damaged, as was chosen: there is more, or an extension fails.
        """
        return b"".join(self.pieces(data, transforms, limit, name)) if transforms else data

    def pieces(self, data: memoryview, transforms: Sequence[str], limit: int, name: str) -> Iterator[bytes]:
        """The same, piece by piece."""
        extensions = self.extensions(transforms, name)
        left = limit
        try:
            stream: Any = io.BufferedReader(_Input(data), _READ_BYTES)
            for extension in extensions:
                stream = extension.transform_from(stream)
            while piece := stream.read(min(_READ_BYTES, left + 1)):
                left -= len(piece)
                if left < 0:
                    raise self._damaged(f"{name!r} is larger than the metadata say")
                yield piece
        except CkptCloudError:
            raise
        except Exception as error:  # noqa: BLE001 - an extension may raise anything
            said = ", ".join(transforms)
            raise self._damaged(f"{name!r} cannot be undone by {said}: {type(error).__name__}: {error}") from None

    def extensions(self, transforms: Sequence[str], name: str) -> list[StreamTransformExtension]:
        """The extensions, last applied first.

        Raises:
            Unsupported: one is not known, or its library is missing.
        """
        try:
            found = self._registry.from_descriptor_list(transforms)
        except Exception as error:  # noqa: BLE001 - an extension may raise anything
            hint = f"give one that knows it: {self._reader}(url, extensions=registry), or install its library"
            raise Unsupported(f"{name!r} was written with {', '.join(transforms)}: {error}", hint=hint) from None
        return [each for each in reversed(found) if isinstance(each, StreamTransformExtension)]
