"""Azure Blob Storage, through obstore."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from obstore.store import AzureStore as ObstoreAzure

from ckpt_cloud.errors import Unsupported
from ckpt_cloud.options import StoreOptions
from ckpt_cloud.stores import azure_settings
from ckpt_cloud.stores.azure_settings import Account
from ckpt_cloud.stores.base import UnfinishedUpload
from ckpt_cloud.stores.location import Location
from ckpt_cloud.stores.native import NativeStore
from ckpt_cloud.stores.obstore_clients import clients

if TYPE_CHECKING:
    from obstore.store import AzureConfig, ClientConfig, RetryConfig

MAX_BLOCKS = 50_000
MAX_BLOCK_BYTES = 4000 << 20
"""https://learn.microsoft.com/azure/storage/blobs/scalability-targets."""
_EXPIRY = "Azure drops blocks that were never committed by itself, a week after the last of them was written"


class AzureStore(NativeStore):
    """Blocks that nobody commits expire by themselves, and no request lists or drops those of others."""

    max_parts = MAX_BLOCKS
    max_part_bytes = MAX_BLOCK_BYTES

    def _version(self, meta: Any) -> str | None:
        # Listings leave out the quotes that belong to an ETag.
        bare = (meta["e_tag"] or "").strip('"')
        return f'"{bare}"' if bare else None

    async def list_uploads(self, prefix: str = "") -> Sequence[UnfinishedUpload]:
        del prefix
        raise Unsupported("unfinished uploads are not listed on Azure", self.url, _EXPIRY)

    async def abort_upload(self, upload: UnfinishedUpload) -> None:
        del upload
        raise Unsupported("unfinished uploads cannot be aborted on Azure", self.url, _EXPIRY)


def open_azure(location: Location, options: StoreOptions) -> NativeStore:
    """The store of the blobs under `location`. Talks to nobody yet.

    Raises:
        MissingCredentials, FixRequest: from the configuration.
        Unsupported: no key and no SAS, and azure-identity is not installed.
    """
    account = azure_settings.account(location, options)
    config = _config(account, options)
    provider = None if account.key or account.sas or options.anonymous else _identity(location)

    def make(client: ClientConfig, retry: RetryConfig) -> ObstoreAzure:
        return ObstoreAzure(
            location.bucket, config=config, client_options=client, retry_config=retry, credential_provider=provider
        )

    made = clients(make, options, endpoint=account.endpoint, ca=options.ca_bundle)
    return AzureStore(made, location.path, location.url, probed_as=f"{account.endpoint} {location.bucket}")


def _config(account: Account, options: StoreOptions) -> AzureConfig:
    config: AzureConfig = {"account_name": account.name, "endpoint": account.endpoint}
    if options.anonymous:
        config["skip_signature"] = True
    elif account.key:
        config["account_key"] = account.key
    elif account.sas:
        config["sas_key"] = account.sas.removeprefix("?")
    return config


def _identity(location: Location) -> Any:
    """Azure's own chain: environment, workload and managed identity, `az login`, ...; renewed when it expires."""
    try:
        from obstore.auth.azure import AzureCredentialProvider
    except ImportError:
        hint = "pip install 'ckpt-cloud[azure]', or give an account key or a SAS token"
        raise Unsupported("DefaultAzureCredential needs azure-identity", location.url, hint) from None
    return AzureCredentialProvider()
