"""Azure Blob Storage, through obstore."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from obstore.store import AzureStore as ObstoreAzure

from ckpt_cloud.errors import Unsupported
from ckpt_cloud.options import StoreOptions
from ckpt_cloud.stores import azure_settings
from ckpt_cloud.stores.azure_identity import credential
from ckpt_cloud.stores.azure_settings import Account
from ckpt_cloud.stores.base import ObjectStore, UnfinishedUpload
from ckpt_cloud.stores.location import Location
from ckpt_cloud.stores.native import Clients, NativeStore
from ckpt_cloud.stores.obstore_clients import clients

if TYPE_CHECKING:
    from obstore.store import AzureConfig, ClientConfig, RetryConfig

MAX_BLOCKS = 50_000
MAX_BLOCK_BYTES = 4000 << 20
"""https://learn.microsoft.com/azure/storage/blobs/scalability-targets."""


class AzureStore(NativeStore):
    """With Azure's own library beside obstore, which knows nothing of blocks that others never committed."""

    max_parts = MAX_BLOCKS
    max_part_bytes = MAX_BLOCK_BYTES

    def _version(self, meta: Any) -> str | None:
        # Listings leave out the quotes that belong to an ETag.
        bare = (meta["e_tag"] or "").strip('"')
        return f'"{bare}"' if bare else None

    def __init__(self, clients: Clients, location: Location, options: StoreOptions, *, probed_as: str) -> None:
        super().__init__(clients, location.path, location.url, probed_as=probed_as)
        self._location = location
        self._options = options

    async def list_uploads(self, prefix: str = "") -> Sequence[UnfinishedUpload]:
        return await self._beside.list_uploads(prefix)

    async def abort_upload(self, upload: UnfinishedUpload) -> None:
        await self._beside.abort_upload(upload)

    @cached_property
    def _beside(self) -> ObjectStore:
        from ckpt_cloud.stores.fsspec_engine import open_fsspec

        return open_fsspec(self._location, self._options)


def open_azure(location: Location, options: StoreOptions) -> NativeStore:
    """The store of the blobs under `location`. Talks to nobody yet.

    Raises:
        MissingCredentials, FixRequest: from the configuration.
        Unsupported: no key and no SAS, and azure-identity is not installed.
    """
    account = azure_settings.account(location, options)
    config = _config(account, options)
    provider = None if account.key or account.sas or options.anonymous else _identity(location, options)

    def make(client: ClientConfig, retry: RetryConfig) -> ObstoreAzure:
        return ObstoreAzure(
            location.bucket, config=config, client_options=client, retry_config=retry, credential_provider=provider
        )

    made = clients(make, options, endpoint=account.endpoint, ca=options.ca_bundle)
    return AzureStore(made, location, options, probed_as=f"{account.endpoint} {location.bucket}")


def _config(account: Account, options: StoreOptions) -> AzureConfig:
    config: AzureConfig = {"account_name": account.name, "endpoint": account.endpoint}
    if options.anonymous:
        config["skip_signature"] = True
    elif account.key:
        config["account_key"] = account.key
    elif account.sas:
        config["sas_key"] = account.sas.removeprefix("?")
    return config


def _identity(location: Location, options: StoreOptions) -> Any:
    """Azure's own chain: environment, workload and managed identity, `az login`, ...; renewed when it expires."""
    try:
        import azure.identity
        from obstore.auth.azure import AzureCredentialProvider
    except ImportError:
        hint = "pip install 'ckpt-cloud[azure]', or give an account key or a SAS token"
        raise Unsupported("DefaultAzureCredential needs azure-identity", location.url, hint) from None
    return AzureCredentialProvider(credential(azure.identity, options))
