"""Values that a user may set, with their defaults; refused here, where they are made, when they make no sense."""

from __future__ import annotations

import base64
import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from ckpt_cloud.errors import InvalidOption

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

Engine = Literal["native", "fsspec"]

_SIGNING = (
    "access_key_id",
    "secret_access_key",
    "session_token",
    "access_token",
    "connection_string",
    "account_key",
    "sas_token",
)
_SECRETS = (*_SIGNING, "sse_customer_key", "filesystem", "filesystem_options")
_CUSTOMER_KEY_BYTES = 32


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
    """No further attempt begins this long after the first failed."""
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
    config and credentials files, profiles, SSO, web identity, container and instance roles. For Google Cloud Storage
    it is `STORAGE_EMULATOR_HOST` and application default credentials. For Azure it is
    `AZURE_STORAGE_CONNECTION_STRING`, the other `AZURE_STORAGE_*` variables, and `DefaultAzureCredential`.
    Secrets given here, and a filesystem, are neither shown by `repr` nor pickled.
    """

    engine: Engine | None = None
    """`native` (obstore) or `fsspec`; by default what the URL's scheme stands for (docs/stores.md)."""
    endpoint_url: str | None = None
    """Of another server than the cloud's own, such as `http://127.0.0.1:8333`."""
    anonymous: bool = False
    """Sign nothing: for public buckets."""

    region: str | None = None
    """S3: of the bucket."""
    profile: str | None = None
    """S3: name of a profile in the shared AWS config."""
    access_key_id: str | None = field(default=None, repr=False)
    secret_access_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)
    virtual_hosted_style: bool | None = None
    """S3: `https://bucket.host/key` rather than `https://host/bucket/key`; by default what the AWS config says, else
    only without an endpoint, and not for a bucket with a dot in its name."""
    requester_pays: bool = False
    """S3: the requests are paid by who makes them (`x-amz-request-payer`); Google: by `project`."""
    store_checksums: bool | None = None
    """S3: have the store check a checksum of every upload; by default only where `AWS_REQUEST_CHECKSUM_CALCULATION`,
    or `request_checksum_calculation` in the AWS config, is set to `when_supported`."""
    server_side_encryption: Literal["AES256", "aws:kms", "aws:kms:dsse"] | None = None
    """S3: `x-amz-server-side-encryption` of what is written (SSE-S3, SSE-KMS); by default the bucket's own."""
    sse_kms_key_id: str | None = None
    """S3: the KMS key for it."""
    sse_bucket_key: bool | None = None
    """S3: whether the bucket's own key wraps the KMS key, which saves requests to KMS."""
    sse_customer_key: str | None = field(default=None, repr=False)
    """S3: a key of 32 bytes in Base64 with which the store encrypts and then forgets (SSE-C); reading needs it too."""

    project: str | None = None
    """Google: the project that pays with `requester_pays`; by default `GOOGLE_CLOUD_PROJECT`."""
    credentials_file: str | None = None
    """Google: path of a JSON file of credentials; by default `GOOGLE_APPLICATION_CREDENTIALS`."""
    access_token: str | None = field(default=None, repr=False)
    """Google: an OAuth 2.0 access token; it is not renewed."""

    connection_string: str | None = field(default=None, repr=False)
    """Azure: account, key or SAS, and endpoint in one."""
    account_name: str | None = None
    account_key: str | None = field(default=None, repr=False)
    sas_token: str | None = field(default=None, repr=False)

    filesystem: Any = field(default=None, repr=False)
    """An fsspec filesystem to use as it is, with its own credentials."""
    filesystem_options: dict[str, Any] | None = field(default=None, repr=False, hash=False)
    """Further arguments of the fsspec filesystem that the `fsspec` engine makes."""

    ca_bundle: str | None = None
    """Path of a PEM file with further certificate authorities; default `AWS_CA_BUNDLE` on S3."""
    proxy_url: str | None = None
    """Of an HTTP proxy; default the `HTTPS_PROXY` and `HTTP_PROXY` variables, but for `NO_PROXY`."""
    connect_timeout_s: float = 5.0
    request_timeout_s: float = 120.0
    """For one whole request, body included: a part must move within it."""
    retry: RetryOptions = RetryOptions()
    secrets_dropped: tuple[str, ...] = field(default=(), repr=False)
    """On a pickled copy: names of the options that were left behind."""

    def __post_init__(self) -> None:
        both = (self.access_key_id is None) == (self.secret_access_key is None)
        _require(both, "access_key_id and secret_access_key go together; give both or neither")
        keys = [name for name in _SIGNING if getattr(self, name) is not None]
        _require(not (self.anonymous and keys), f"anonymous excludes {' and '.join(keys)}")
        _require(self.engine in (None, "native", "fsspec"), f"engine is {self.engine!r}; it is 'native' or 'fsspec'")
        self._check_filesystem()
        self._check_encryption()
        _require(isinstance(self.retry, RetryOptions), f"retry must be RetryOptions, not {self.retry!r}")
        for name in ("connect_timeout_s", "request_timeout_s"):
            seconds = getattr(self, name)
            _require(isinstance(seconds, int | float), f"{name} must be seconds, not {seconds!r}")
        _require(self.connect_timeout_s > 0 and self.request_timeout_s > 0, "timeouts must be positive seconds")

    def _check_filesystem(self) -> None:
        _require(self.filesystem is None or self.engine != "native", "a filesystem is used by the engine 'fsspec'")
        _require(
            self.filesystem is None or hasattr(self.filesystem, "_strip_protocol"),
            f"filesystem is a {type(self.filesystem).__name__}; give an fsspec filesystem object",
        )
        both = self.filesystem is not None and self.filesystem_options is not None
        _require(not both, "filesystem_options are for making a filesystem; leave them out with filesystem")

    def _check_encryption(self) -> None:
        kms = self.sse_kms_key_id is not None or self.sse_bucket_key is not None
        is_kms = (self.server_side_encryption or "").startswith("aws:kms")
        _require(not kms or is_kms, "sse_kms_key_id and sse_bucket_key need server_side_encryption='aws:kms'")
        known = (None, "AES256", "aws:kms", "aws:kms:dsse")
        _require(
            self.server_side_encryption in known, f"server_side_encryption must be one of {', '.join(map(str, known))}"
        )
        if self.sse_customer_key is not None:
            _require(self.server_side_encryption is None, "sse_customer_key excludes server_side_encryption")
            _require(_is_key(self.sse_customer_key), "sse_customer_key must be 32 bytes in Base64")

    def __reduce__(self) -> tuple[Any, ...]:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        dropped = tuple(name for name in _SECRETS if values[name] is not None)
        values |= dict.fromkeys(_SECRETS) | {"secrets_dropped": self.secrets_dropped or dropped}
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


def _is_key(text: str) -> bool:
    try:
        return len(base64.b64decode(text, validate=True)) == _CUSTOMER_KEY_BYTES
    except ValueError:
        return False


def _rebuild_store_options(values: dict[str, Any]) -> StoreOptions:
    return StoreOptions(**values)


@dataclass(frozen=True, slots=True)
class TransferOptions:
    """How bytes move.

    Memory beyond the state dict stays within `memory_budget`, and what the libraries need themselves. Loading what was
    compressed takes up to 4 MiB more for each worker thread, of which there are as many as cores and two, at most 8.
    A chunk that went through stream transforms is held whole while it is undone: as stored, and as it was.
    """

    memory_budget: int = 512 * MIB
    """Bytes of staged parts and fetched ranges of one save or load that may exist at once."""
    part_size: int = 16 * MIB
    """Of a multipart upload. A save of less than 6 parts for each of `max_requests` takes smaller ones, of 5 MiB or
    more; a large object larger ones, so that it has at most 10,000 (on Azure 50,000 blocks)."""
    pack_size: int = 256 * MIB
    """A rank's data is spread over objects of about this size; a larger tensor gets one of its own."""
    column_chunks: int = 4
    """A shard that is a part of each row of its tensor is stored as up to this many chunks of about 1 MiB or more side
    by side, so that a load into another sharding fetches fewer columns that it does not need. It is copied to be saved;
    1 stores it as it is."""
    max_requests: int = 32
    """Requests of one save or load in flight, on each rank."""
    range_size: int = 16 * MIB
    """Longest single ranged read."""
    gap_size: int = 512 * KIB
    """Unneeded bytes between two needed ranges that are read over rather than asked for apart."""
    block_size: int = 64 * KIB
    """Bytes under one CRC32C; a partial read is widened to whole blocks so that it can be verified."""
    block_digests: bool = False
    """Also note the SHA-256 of every block, in 32 bytes more of the manifest; about 0.6 s of one core for each GiB.
    `sign=` sets it."""
    spread: int = 0
    """Hexadecimal digits of a hash before the id of each data object, 0 to 4: spreads a checkpoint's keys over 16,
    256, ... prefixes, for stores that limit the requests per prefix."""
    inline_limit: int = 64 * KIB
    """Non-tensor items up to this size ride in the manifest and cost no request."""
    compression: Literal["zstd"] | None = None
    """Of tensors, and of items that are not in the manifest, when saving; needs `ckpt-cloud[zstd]`."""
    compression_level: int = 1
    """Zstandard's, from -100 (fastest) to 22 (smallest)."""
    frame_size: int = 512 * KIB
    """Bytes that are compressed at a time, each such frame on its own: a partial read fetches whole frames."""

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
        _require(0 <= self.spread <= 4, "spread must be 0 to 4 hexadecimal digits")
        _require(self.column_chunks >= 1, "column_chunks must be at least 1")
        _require(self.max_requests >= 1, "max_requests must be at least 1")
        _require(self.compression in (None, "zstd"), f"compression is {self.compression!r}; it is 'zstd' or None")
        _require(-100 <= self.compression_level <= 22, "compression_level must be from -100 to 22")
        size = self.frame_size
        _require(
            4 * KIB <= size <= 4 * MIB and size & (size - 1) == 0, "frame_size must be 4 KiB to 4 MiB, a power of 2"
        )
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
