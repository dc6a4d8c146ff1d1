"""Google Cloud Storage, through obstore, which speaks the XML API."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from obstore.store import GCSStore as ObstoreGCS

from ckpt_cloud.errors import Unsupported
from ckpt_cloud.options import StoreOptions
from ckpt_cloud.stores import google_settings
from ckpt_cloud.stores.base import UnfinishedUpload
from ckpt_cloud.stores.location import Location
from ckpt_cloud.stores.native import NativeStore
from ckpt_cloud.stores.obstore_clients import clients

if TYPE_CHECKING:
    from collections.abc import Sequence

    from obstore.store import ClientConfig, GCSConfig, RetryConfig

_UPLOADS_HINT = "set a lifecycle rule with AbortIncompleteMultipartUpload on the bucket, or use the engine 'fsspec'"


class GCSStore(NativeStore):
    """A version is a generation, for writes, and an ETag, for reads."""

    def _version(self, meta: Any) -> str | None:
        return f"{meta['version']}:{meta['e_tag']}" if meta["version"] and meta["e_tag"] else None

    def _pinned(self, version: str) -> str:
        return version.partition(":")[2]

    def _replaced(self, version: str) -> dict[str, str]:
        generation, _, e_tag = version.partition(":")
        return {"version": generation, "e_tag": e_tag}

    async def list_uploads(self, prefix: str = "") -> Sequence[UnfinishedUpload]:
        del prefix
        raise Unsupported("obstore does not list unfinished uploads on Google Cloud Storage", self.url, _UPLOADS_HINT)

    async def abort_upload(self, upload: UnfinishedUpload) -> None:
        del upload
        raise Unsupported("obstore does not abort uploads on Google Cloud Storage", self.url, _UPLOADS_HINT)


def open_gcs(location: Location, options: StoreOptions) -> NativeStore:
    """The store of the objects under `location`. Talks to nobody yet.

    Raises:
        MissingCredentials, FixRequest, Unsupported: from the configuration.
    """
    endpoint = google_settings.endpoint_url(options, location.url)
    config: GCSConfig = {}
    if endpoint:
        config["base_url"] = endpoint
    provider: Any = None
    if options.anonymous:
        config["skip_signature"] = True
    elif google_settings.unsigned(options):
        # Asked to sign nothing, obstore still wants a token for writes.
        provider = google_settings.for_emulators
    else:
        provider = google_settings.CredentialProvider(google_settings.credentials(options, location.url))

    def make(client: ClientConfig, retry: RetryConfig) -> ObstoreGCS:
        return ObstoreGCS(
            location.bucket, config=config, client_options=client, retry_config=retry, credential_provider=provider
        )

    billed = _billed(google_settings.payer(options, location.url), make)
    made = clients(billed, options, endpoint=endpoint, ca=options.ca_bundle)
    return GCSStore(made, location.path, location.url, probed_as=f"{endpoint or 'gcs'} {location.bucket}")


def _billed(project: str | None, make: Any) -> Any:
    """`make`, with the project that pays for the requests in a header."""
    if project is None:
        return make

    def billed(client: ClientConfig, retry: RetryConfig) -> Any:
        return make({**client, "default_headers": {"x-goog-user-project": project}}, retry)

    return billed
