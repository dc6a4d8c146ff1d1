"""S3 and servers that speak its dialect, through obstore."""

from __future__ import annotations

import urllib.parse
from datetime import timedelta
from typing import TYPE_CHECKING

from obstore.store import S3Store

from ckpt_cloud.options import RetryOptions, StoreOptions
from ckpt_cloud.stores import credentials
from ckpt_cloud.stores.native import NativeStore

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig, S3Config


def open_s3(bucket: str, prefix: str, url: str, options: StoreOptions, *, first_contact: bool) -> NativeStore:
    """The store of the objects under `prefix` in `bucket`. Talks to nobody yet.

    Raises:
        MissingCredentials, FixRequest: from the configuration.
    """
    chain = credentials.session(options, url)
    endpoint = credentials.endpoint_url(chain, options)
    provider = None if options.anonymous else credentials.credential_provider(chain, options, url)

    def client(retry: RetryConfig) -> S3Store:
        return S3Store(
            bucket,
            config=_config(bucket, credentials.region(chain), endpoint, options),
            client_options=_client(options, endpoint),
            retry_config=retry,
            credential_provider=provider,
        )

    patient = client(_retry(options.retry, first_contact=first_contact))
    return NativeStore(patient, client({"max_retries": 0}), prefix, url, probed_as=f"{endpoint or 'aws'} {bucket}")


def _config(bucket: str, region: str, endpoint: str | None, options: StoreOptions) -> S3Config:
    """Payloads go unsigned: TLS protects them on the way, and our own checksums from there on."""
    config: S3Config = {"unsigned_payload": True, "region": region}
    virtual = options.virtual_hosted_style if options.virtual_hosted_style is not None else not endpoint
    config["virtual_hosted_style_request"] = virtual
    if endpoint:
        address = _with_bucket(endpoint, bucket) if virtual else endpoint
        config["endpoint"] = config["aws_endpoint_url_s3"] = address
    if options.store_checksums:
        config["checksum_algorithm"] = "crc64nvme"
    if options.anonymous:
        config["skip_signature"] = True
    return config


def _with_bucket(endpoint: str, bucket: str) -> str:
    parts = urllib.parse.urlsplit(endpoint)
    return parts._replace(netloc=f"{bucket}.{parts.netloc}").geturl()


def _client(options: StoreOptions, endpoint: str | None) -> ClientConfig:
    client: ClientConfig = {
        "connect_timeout": timedelta(seconds=options.connect_timeout_s),
        "timeout": timedelta(seconds=options.request_timeout_s),
        "allow_http": bool(endpoint and endpoint.startswith("http://")),
    }
    if options.proxy_url:
        client["proxy_url"] = options.proxy_url
    bundle = credentials.ca_bundle(options)
    if bundle:
        client["root_certificate"] = bundle
    return client


def _retry(retry: RetryOptions, *, first_contact: bool) -> RetryConfig:
    deadline = min(retry.first_contact_s, retry.deadline_s) if first_contact else retry.deadline_s
    return {
        "max_retries": retry.max_retries,
        "retry_timeout": timedelta(seconds=deadline),
        "backoff": {
            "init_backoff": timedelta(milliseconds=100),
            "max_backoff": timedelta(seconds=min(retry.max_backoff_s, deadline / 4)),
            "base": 2,
        },
    }
