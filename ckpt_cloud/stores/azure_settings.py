"""Azure's account, credentials and endpoint: keyword arguments, then the URL, then `AZURE_STORAGE_*`."""

from __future__ import annotations

import base64
import os
import urllib.parse
from dataclasses import dataclass, field

from ckpt_cloud.errors import FixRequest, MissingCredentials
from ckpt_cloud.options import StoreOptions
from ckpt_cloud.stores.location import Location
from ckpt_cloud.stores.reaching import address

_HINT = (
    "set AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY or "
    "AZURE_STORAGE_SAS_TOKEN, or log in (az login); or write abfs://container@account.dfs.core.windows.net/path"
)
_PUBLIC = "core.windows.net"
_EMULATOR = {
    # Public and the same everywhere: https://learn.microsoft.com/azure/storage/common/storage-use-emulator
    "DefaultEndpointsProtocol": "http",
    "AccountName": "devstoreaccount1",
    "AccountKey": "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==",
    "BlobEndpoint": "http://127.0.0.1:10000/devstoreaccount1",
}


@dataclass(frozen=True, slots=True)
class Account:
    """A storage account and how to sign for it; without key and SAS by the identity of `DefaultAzureCredential`.

    Attributes:
        endpoint: of the blob service, with the scheme and, for emulators, the account as its path.
    """

    name: str
    endpoint: str
    key: str | None = field(default=None, repr=False)
    sas: str | None = field(default=None, repr=False)


def account(location: Location, options: StoreOptions) -> Account:
    """The account for `location`: keyword arguments first, then the URL's, then the environment.

    Raises:
        MissingCredentials: no account is named anywhere.
        FixRequest: the connection string cannot be read, or names another account than the URL.
    """
    given = {
        "AccountName": options.account_name,
        "AccountKey": options.account_key,
        "SharedAccessSignature": options.sas_token,
        "BlobEndpoint": options.endpoint_url,
    }
    parts = {**_configured(location, options), **{name: value for name, value in given.items() if value}}
    if options.account_key and not options.sas_token:
        parts.pop("SharedAccessSignature", None)
    if options.sas_token and not options.account_key:
        parts.pop("AccountKey", None)
    host = location.account
    name = host.partition(".")[0] or parts.get("AccountName") or _from_endpoint(parts.get("BlobEndpoint"))
    if not name:
        raise MissingCredentials("no Azure storage account is named", location.url, _HINT)
    if host and parts.get("AccountName", name) != name:
        known = parts["AccountName"]
        raise FixRequest(f"the URL names the account {name}, the configuration {known}", location.url, _HINT)
    endpoint = address(parts.get("BlobEndpoint") or _endpoint(name, host, parts), "endpoint", location.url)
    key = parts.get("AccountKey")
    if key and not _is_base64(key):
        raise FixRequest("the Azure account key is not Base64", location.url, "copy it anew, with its = at the end")
    return Account(name, endpoint, key, parts.get("SharedAccessSignature"))


def _configured(location: Location, options: StoreOptions) -> dict[str, str]:
    """From the connection string, or from the single variables where there is none."""
    text = options.connection_string
    if text is None and not options.account_name:
        text = os.environ.get("AZURE_STORAGE_CONNECTION_STRING")
    if text:
        return _parsed(text, location.url)
    variables = {
        "AccountName": ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT"),
        "AccountKey": ("AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_KEY"),
        "SharedAccessSignature": ("AZURE_STORAGE_SAS_TOKEN",),
        "BlobEndpoint": ("AZURE_STORAGE_ENDPOINT",),
    }
    found = {part: _first(names) for part, names in variables.items()}
    if options.account_name and options.account_name != found["AccountName"]:
        # Keys in the environment are of another account.
        return {}
    return {part: value for part, value in found.items() if value}


def _first(names: tuple[str, ...]) -> str | None:
    return next((os.environ[name] for name in names if os.environ.get(name)), None)


def _parsed(text: str, url: str) -> dict[str, str]:
    """https://learn.microsoft.com/azure/storage/common/storage-configure-connection-string."""
    pairs = [part.partition("=") for part in text.strip().strip(";").split(";")]
    parts = {name.strip(): value.strip() for name, equals, value in pairs if equals}
    if len(parts) < len(pairs):
        raise FixRequest("the Azure connection string is not a list of Name=value; pairs", url, "copy it anew")
    if parts.get("UseDevelopmentStorage", "").lower() == "true":
        return _EMULATOR
    return parts


def _endpoint(name: str, host: str, parts: dict[str, str]) -> str:
    suffix = parts.get("EndpointSuffix", _PUBLIC)
    if "." in host:
        # The URL's host names the data lake's endpoint; blobs have their own beside it.
        suffix = host.partition(".")[2].removeprefix("dfs.").removeprefix("blob.")
    return f"{parts.get('DefaultEndpointsProtocol', 'https')}://{name}.blob.{suffix}"


def _is_base64(text: str) -> bool:
    try:
        # The decoder takes too many signs at the end, obstore does not.
        return bool(text) and base64.b64encode(base64.b64decode(text, validate=True)).decode() == text
    except ValueError:
        return False


def _from_endpoint(endpoint: str | None) -> str | None:
    """Of `https://account.blob.core.windows.net` or `http://127.0.0.1:10000/account`."""
    if not endpoint:
        return None
    parts = urllib.parse.urlsplit(endpoint)
    return parts.path.strip("/") or (parts.hostname or "").partition(".")[0] or None
