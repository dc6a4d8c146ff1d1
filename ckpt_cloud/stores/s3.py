"""S3 and servers that speak its dialect, through obstore."""

from __future__ import annotations

import urllib.parse
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

import obstore
from obstore.store import S3Store as ObstoreS3

from ckpt_cloud.errors import Unsupported, WrongRegion
from ckpt_cloud.format.layout import join
from ckpt_cloud.options import StoreOptions
from ckpt_cloud.stores import aws
from ckpt_cloud.stores.base import UnfinishedUpload
from ckpt_cloud.stores.beside_s3 import BesideS3
from ckpt_cloud.stores.direct import DirectReads
from ckpt_cloud.stores.foreign_errors import in_region
from ckpt_cloud.stores.location import Location
from ckpt_cloud.stores.native import Clients, NativeStore
from ckpt_cloud.stores.obstore_clients import clients, stalled_s

if TYPE_CHECKING:
    from botocore.session import Session
    from obstore.store import ClientConfig, RetryConfig, S3Config


_SIGNED_FOR = timedelta(minutes=10)
"""Of a URL that is used within the next minutes."""


class S3Store(NativeStore):
    """With boto3 beside obstore, which knows nothing of uploads that others left unfinished."""

    def __init__(
        self, clients: Clients, location: Location, beside: BesideS3, direct: DirectReads | None, *, probed_as: str
    ) -> None:
        super().__init__(clients, location.path, location.url, probed_as=probed_as)
        self._beside = beside
        self._direct = direct

    async def get_range_into(
        self, key: str, start: int, end: int, into: Sequence[memoryview], version: str | None = None
    ) -> None:
        path = join(self._prefix, key)
        direct = self._direct if start < end else None
        if direct is None or not await direct.read(path, start, end, into, version):
            await super().get_range_into(key, start, end, into, version)

    async def list_children(self, prefix: str = "") -> Sequence[str]:
        found = await super().list_children(prefix)
        if not found:
            await self._beside.check_listing()
        return found

    async def _located(self, error: WrongRegion) -> WrongRegion:
        region = await self._beside.region()
        return in_region(region, error) if region else error

    async def delete(self, keys: Sequence[str]) -> None:
        try:
            await super().delete(keys)
        except Unsupported:
            # obstore deletes in bulk only, which some servers do not implement.
            await self._beside.delete_one_by_one(keys)

    async def list_uploads(self, prefix: str = "") -> Sequence[UnfinishedUpload]:
        return await self._beside.list_uploads(prefix)

    async def abort_upload(self, upload: UnfinishedUpload) -> None:
        await self._beside.abort_upload(upload)


def open_s3(location: Location, options: StoreOptions) -> NativeStore:
    """The store of the objects under `location`. Talks to nobody yet.

    Raises:
        MissingCredentials, FixRequest: from the configuration.
    """
    chain = aws.session(options, location.url)
    endpoint = aws.endpoint_url(chain, options, location.url)
    provider = None if options.anonymous else aws.credential_provider(chain, options, location.url)
    config = _config(location.bucket, chain, endpoint, options)

    def make(client: ClientConfig, retry: RetryConfig) -> ObstoreS3:
        return ObstoreS3(
            location.bucket, config=config, client_options=client, retry_config=retry, credential_provider=provider
        )

    ca = aws.ca_bundle(chain, location.url)
    made = clients(make, options, endpoint=endpoint, ca=ca)
    beside = BesideS3(chain, location, options, endpoint=endpoint)
    probed_as = f"{endpoint or 'aws'} {location.bucket}"
    return S3Store(made, location, beside, _direct(made, options, ca), probed_as=probed_as)


def _direct(clients: Clients, options: StoreOptions, ca: str | None) -> DirectReads | None:
    """Reads past obstore, where a signed URL is all that it takes."""
    if options.anonymous or options.sse_customer_key is not None or options.requester_pays:
        return None
    store = clients.reads
    return DirectReads(
        lambda path: obstore.sign_async(store, "GET", path, _SIGNED_FOR),
        connect_timeout_s=options.connect_timeout_s,
        stalled_s=stalled_s(options),
        timeout_s=options.request_timeout_s,
        proxy_url=options.proxy_url,
        ca=ca,
    )


def _config(bucket: str, chain: Session, endpoint: str | None, options: StoreOptions) -> S3Config:
    """Payloads go unsigned: TLS protects them on the way, and our own checksums from there on."""
    config: S3Config = {"unsigned_payload": True, "region": aws.region(chain)}
    virtual = aws.virtual_hosted_style(chain, options, endpoint, bucket)
    config["virtual_hosted_style_request"] = virtual
    if reached := endpoint or aws.partition_endpoint(chain):
        address = _with_bucket(reached, bucket) if virtual else reached
        config["endpoint"] = config["aws_endpoint_url_s3"] = address
    if aws.store_checksums(chain, options):
        config["checksum_algorithm"] = "crc64nvme"
    if options.anonymous:
        config["skip_signature"] = True
    if options.requester_pays:
        config["request_payer"] = True
    return config | _encryption(options)


def _encryption(options: StoreOptions) -> S3Config:
    if options.sse_customer_key is not None:
        return {"server_side_encryption": "sse-c", "sse_customer_key_base64": options.sse_customer_key}
    config: S3Config = {}
    if options.server_side_encryption is not None:
        config["server_side_encryption"] = options.server_side_encryption
    if options.sse_kms_key_id is not None:
        config["sse_kms_key_id"] = options.sse_kms_key_id
    if options.sse_bucket_key is not None:
        config["sse_bucket_key_enabled"] = options.sse_bucket_key
    return config


def _with_bucket(endpoint: str, bucket: str) -> str:
    parts = urllib.parse.urlsplit(endpoint)
    return parts._replace(netloc=f"{bucket}.{parts.netloc}").geturl()
