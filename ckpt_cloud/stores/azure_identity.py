"""Who asks Azure for tokens, where no key and no SAS is given."""

from __future__ import annotations

import os
from typing import Any

from ckpt_cloud.options import StoreOptions

_PRINCIPAL = ("AZURE_STORAGE_TENANT_ID", "AZURE_STORAGE_CLIENT_ID", "AZURE_STORAGE_CLIENT_SECRET")


def credential(library: Any, options: StoreOptions) -> Any:
    """The service principal of adlfs's variables, else `DefaultAzureCredential`: Azure's own chain.

    Args:
        library: `azure.identity` or `azure.identity.aio`.
        options: of which `proxy_url` counts, for what goes out by TLS; metadata services are reached without.
    """
    arguments = {"proxies": {"https": options.proxy_url}} if options.proxy_url else {}
    principal = [os.environ.get(name) for name in _PRINCIPAL]
    if all(principal):
        return library.ClientSecretCredential(*principal, **arguments)
    return library.DefaultAzureCredential(**arguments)
