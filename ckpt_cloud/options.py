"""Values that a user may set, with their defaults; refused here, where they are made, when they make no sense."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Self

from ckpt_cloud.errors import InvalidOption

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

_SECRETS = ("access_key_id", "secret_access_key", "session_token")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InvalidOption(message)


@dataclass(frozen=True, slots=True)
class RetryOptions:
    """How requests that may be sent again are sent again, with exponential backoff and jitter.

    The commit is never retried by this: its own loop reads the register back between two attempts.
    """

    max_retries: int = 10
    """Further attempts after the first; 0 turns retries off."""
    deadline_s: float = 120.0
    """No further attempt begins this long after the first began."""
    first_contact_s: float = 8.0
    """The same limit for the first request to a store, so that a wrong endpoint is reported within seconds."""
    max_backoff_s: float = 10.0
    """Longest pause between two attempts."""

    def __post_init__(self) -> None:
        _require(self.max_retries >= 0, f"max_retries is {self.max_retries}; it must be 0 or more")
        _require(self.deadline_s > 0 and self.first_contact_s > 0, "retry deadlines must be positive")
        _require(self.max_backoff_s > 0, "max_backoff_s must be positive")


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """Where the store is and who asks. Everything left `None` comes from where the user's other tools take it.

    For S3 that is boto3's chain: `AWS_*` variables (with `AWS_ENDPOINT_URL_S3` and `AWS_ENDPOINT_URL`), the shared
    config and credentials files, profiles, SSO, web identity, container and instance roles.
    Keys given here are neither shown by `repr` nor pickled.
    """

    endpoint_url: str | None = None
    """Of an S3-compatible server, such as `http://127.0.0.1:8333`."""
    region: str | None = None
    profile: str | None = None
    """Name of a profile in the shared AWS config."""
    access_key_id: str | None = field(default=None, repr=False)
    secret_access_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)
    anonymous: bool = False
    """Sign nothing: for public buckets."""
    virtual_hosted_style: bool | None = None
    """`https://bucket.host/key` rather than `https://host/bucket/key`; by default only without an endpoint."""
    store_checksums: bool = False
    """Have the store check a CRC64NVME of every upload (S3 and servers that know additional checksums)."""
    ca_bundle: str | None = None
    """Path of a PEM file with further certificate authorities; default `AWS_CA_BUNDLE`."""
    proxy_url: str | None = None
    connect_timeout_s: float = 5.0
    request_timeout_s: float = 120.0
    """For one whole request, body included: a part must move within it."""
    retry: RetryOptions = RetryOptions()
    secrets_dropped: bool = field(default=False, repr=False)
    """Set on a pickled copy that had keys."""

    def __post_init__(self) -> None:
        both = (self.access_key_id is None) == (self.secret_access_key is None)
        _require(both, "access_key_id and secret_access_key go together; give both or neither")
        _require(not (self.anonymous and self.access_key_id), "anonymous excludes access_key_id")
        _require(self.connect_timeout_s > 0 and self.request_timeout_s > 0, "timeouts must be positive seconds")

    def __reduce__(self) -> tuple[Any, ...]:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        had_secrets = any(values[name] is not None for name in _SECRETS)
        values |= dict.fromkeys(_SECRETS) | {"secrets_dropped": self.secrets_dropped or had_secrets}
        return _rebuild_store_options, (values,)

    @classmethod
    def merged(cls, base: StoreOptions | None, overrides: dict[str, Any]) -> Self:
        """`base`, or the defaults, with single values replaced.

        Raises:
            InvalidOption: a name that is no option.
        """
        known = {f.name for f in dataclasses.fields(cls)} - {"secrets_dropped"}
        for name in overrides:
            _require(name in known, f"unknown option {name!r}; known are {', '.join(sorted(known))}")
        return dataclasses.replace(base or cls(), **overrides)  # type: ignore[return-value]


def _rebuild_store_options(values: dict[str, Any]) -> StoreOptions:
    return StoreOptions(**values)


@dataclass(frozen=True, slots=True)
class TransferOptions:
    """How bytes move.

    Memory beyond the state dict stays below `memory_budget` plus one part for each object in flight.
    """

    memory_budget: int = 512 * MIB
    """Bytes of staged parts and fetched ranges that may exist at once in this process."""
    part_size: int = 16 * MIB
    """Of a multipart upload; grows on its own so that no object exceeds 10,000 parts."""
    pack_size: int = 256 * MIB
    """A rank's data is spread over objects of about this size; a larger tensor gets one of its own."""
    max_requests: int = 16
    """Requests in flight per process."""
    range_size: int = 16 * MIB
    """Longest single ranged read."""
    gap_size: int = 512 * KIB
    """Unneeded bytes between two needed ranges that are read over rather than asked for apart."""
    block_size: int = 256 * KIB
    """Bytes under one CRC32C; a partial read is widened to whole blocks so that it can be verified."""
    inline_limit: int = 64 * KIB
    """Non-tensor items up to this size ride in the manifest and cost no request."""

    def __post_init__(self) -> None:
        _require(self.part_size >= 5 * MIB, "part_size must be at least 5 MiB, the least that S3 takes")
        _require(self.part_size <= 4 * GIB, "part_size must be at most 4 GiB")
        _require(self.block_size >= 4 * KIB, "block_size must be at least 4 KiB")
        _require(self.block_size & (self.block_size - 1) == 0, "block_size must be a power of two")
        _require(self.part_size % self.block_size == 0, "part_size must be a multiple of block_size")
        _require(self.memory_budget >= 2 * self.part_size, "memory_budget must hold at least two parts")
        _require(self.memory_budget >= 2 * self.range_size, "memory_budget must hold at least two ranges")
        _require(self.pack_size >= self.part_size, "pack_size must be at least part_size")
        _require(self.range_size >= self.block_size, "range_size must be at least block_size")
        _require(self.max_requests >= 1, "max_requests must be at least 1")
        _require(self.gap_size >= 0 and self.inline_limit >= 0, "gap_size and inline_limit must not be negative")


@dataclass(frozen=True, slots=True)
class CommitOptions:
    """Limits of the commit protocol."""

    deadline_s: float = 60.0
    """After this long without a clear answer the commit is reported as `CommitStateUnknown`."""
    pause_s: float = 0.2
    """First pause between two attempts; doubles up to `max_pause_s`."""
    max_pause_s: float = 5.0
    allow_unsafe_commit: bool = False
    """Save even to a store that ignores conditional writes, where two savers of one URL can both believe they won."""

    def __post_init__(self) -> None:
        _require(min(self.deadline_s, self.pause_s, self.max_pause_s) > 0, "commit limits must be positive seconds")
