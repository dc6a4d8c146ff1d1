"""What a user adds to a checkpoint: metrics, kept in `COMMIT`, and free metadata, kept in the manifest."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import msgspec

from ckpt_cloud.errors import InvalidOption

MAX_METRICS = 256
MAX_METADATA_BYTES = 4 << 20
_MAX_NAME = 128


@dataclass(frozen=True, slots=True)
class Annotations:
    """Checked metrics and metadata of one save."""

    metrics: dict[str, float] | None
    user_metadata: dict[str, Any] | None

    @classmethod
    def of(cls, metrics: Mapping[str, float] | None, user_metadata: Mapping[str, Any] | None) -> Self:
        """Both, as they will be stored.

        Raises:
            InvalidOption: a metric that is no finite number, more than 256 of them, or metadata that is no JSON or
                larger than 4 MiB.
        """
        return cls(_metrics(metrics) if metrics else None, _metadata(user_metadata) if user_metadata else None)


def _metrics(given: Mapping[str, float]) -> dict[str, float]:
    if len(given) > MAX_METRICS:
        raise InvalidOption(f"{len(given)} metrics; COMMIT has room for {MAX_METRICS}", hint="put them into metadata")
    return {_name(name): _number(name, value) for name, value in given.items()}


def _name(name: object) -> str:
    if not isinstance(name, str) or not 0 < len(name) <= _MAX_NAME:
        raise InvalidOption(f"a metric is called {str(name)[:_MAX_NAME]!r}; names are str of 1 to {_MAX_NAME} letters")
    return name


def _number(name: str, value: object) -> float:
    """A float, from whatever converts to one, such as a tensor or a numpy scalar of one element."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise InvalidOption(f"metric {name!r} is a {type(value).__name__}, not a number") from None
    if not math.isfinite(number):
        raise InvalidOption(f"metric {name!r} is {number}, which nothing can be compared with", hint="leave it out")
    return number


def _metadata(given: Mapping[str, Any]) -> dict[str, Any]:
    try:
        text = msgspec.json.encode(dict(given))
        stored: dict[str, Any] = msgspec.json.decode(text)
    except (TypeError, ValueError, RecursionError, msgspec.MsgspecError) as error:
        hint = "use str, int, float, bool, None, and lists and dicts of them"
        raise InvalidOption(f"the metadata is no JSON: {error}", hint=hint) from None
    if len(text) > MAX_METADATA_BYTES:
        raise InvalidOption(f"the metadata has {len(text)} bytes of JSON, at most {MAX_METADATA_BYTES} are possible")
    return stored
