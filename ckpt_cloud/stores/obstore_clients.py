"""How obstore's clients are set up, whatever the cloud."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt_cloud.options import StoreOptions
from ckpt_cloud.stores import part_retries
from ckpt_cloud.stores.native import Clients

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig

_STALLED_S = 30.0
"""A body that has brought nothing for this long has stopped coming."""
_SIGNED_FOR_S = 240.0
"""A retry keeps its request's signature, which S3 accepts for 15 minutes; obstore asks to stay below 5."""


def clients(
    make: Callable[[ClientConfig, RetryConfig], Any], options: StoreOptions, *, endpoint: str | None, ca: str | None
) -> Clients:
    """The clients of one bucket.

    Args:
        make: the store for a client and a retry configuration.
        endpoint: other than the cloud's own; plain HTTP is allowed if it says `http://`.
        ca: path of a PEM file with further certificate authorities.
    """
    client = _client(options, endpoint, ca)
    stalled = min(_STALLED_S, options.request_timeout_s)
    reading: ClientConfig = {**client, "read_timeout": timedelta(seconds=stalled)}
    once: RetryConfig = {"max_retries": 0}
    patient = _parts(options)
    # Now, so that a configuration that cannot be is refused; everything begins with a read.
    read = make(reading, once)
    return Clients(
        once=lambda: make(client, once),
        reads=lambda: read,
        parts=lambda: make(client, patient),
        lists=lambda: make(reading, patient),
    )


def _client(options: StoreOptions, endpoint: str | None, ca: str | None) -> ClientConfig:
    client: ClientConfig = {
        "connect_timeout": timedelta(seconds=options.connect_timeout_s),
        "timeout": timedelta(seconds=options.request_timeout_s),
        "allow_http": bool(endpoint and endpoint.startswith("http://")),
    }
    if options.proxy_url:
        client["proxy_url"] = options.proxy_url
    if ca:
        client["root_certificate"] = Path(ca).read_bytes()
    return client


def _parts(options: StoreOptions) -> RetryConfig:
    longest = min(options.retry.max_backoff_s, part_retries.MAX_BACKOFF_S)
    return {
        "max_retries": min(part_retries.MOST, options.retry.max_retries),
        "retry_timeout": timedelta(seconds=min(options.retry.deadline_s, _SIGNED_FOR_S)),
        "backoff": {
            # obstore draws from between the two, and panics where there is nothing between.
            "init_backoff": timedelta(seconds=min(part_retries.FIRST_BACKOFF_S, longest / 2)),
            "max_backoff": timedelta(seconds=longest),
            "base": 2,
        },
    }
