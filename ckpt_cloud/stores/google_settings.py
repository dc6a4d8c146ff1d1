"""Google's credentials and endpoint: keyword arguments, then what Google's own libraries would use."""

from __future__ import annotations

import os
import warnings
from datetime import UTC
from typing import TYPE_CHECKING, Any

from ckpt_cloud.errors import FixRequest, MissingCredentials, Unsupported
from ckpt_cloud.options import StoreOptions
from ckpt_cloud.stores.reaching import address

if TYPE_CHECKING:
    from google.auth.credentials import Credentials

SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"
_HINT = (
    "run gcloud auth application-default login, set GOOGLE_APPLICATION_CREDENTIALS, or give the process a service "
    "account; pass anonymous=True for a public bucket"
)


def endpoint_url(options: StoreOptions, url: str) -> str | None:
    """As asked, else the emulator's; None for Google itself.

    Raises:
        FixRequest: it is no address.
    """
    asked = options.endpoint_url or os.environ.get("STORAGE_EMULATOR_HOST")
    if not asked or asked == "default":
        return None
    return address(asked if "://" in asked else f"http://{asked}", "endpoint", url)


def unsigned(options: StoreOptions) -> bool:
    """Whether requests go without credentials: as asked, and to an emulator unless credentials are given."""
    given = options.access_token or options.credentials_file
    return options.anonymous or (bool(os.environ.get("STORAGE_EMULATOR_HOST")) and not given)


def payer(options: StoreOptions, url: str) -> str | None:
    """The project that pays for requests, where the requester does.

    Raises:
        FixRequest: none is named.
    """
    if not options.requester_pays:
        return None
    project = options.project or os.environ.get("GOOGLE_CLOUD_PROJECT")
    if not project:
        raise FixRequest("requester_pays without a project", url, "set project= or GOOGLE_CLOUD_PROJECT")
    return project


def credentials(options: StoreOptions, url: str) -> Credentials:
    """The credentials that `options` name, else application default credentials.

    Raises:
        MissingCredentials: none anywhere.
        FixRequest: the file cannot be used.
        Unsupported: google-auth is not installed.
    """
    try:
        import google.auth
        import google.auth.exceptions
        import google.oauth2.credentials
    except ImportError:
        raise Unsupported("gs:// needs google-auth", url, "pip install 'ckpt-cloud[gcs]'") from None
    if options.access_token:
        return google.oauth2.credentials.Credentials(options.access_token)
    try:
        if options.credentials_file:
            with warnings.catch_warnings():
                # Of files from strangers; this one is the user's own.
                warnings.simplefilter("ignore", DeprecationWarning)
                found = google.auth.load_credentials_from_file(options.credentials_file, scopes=[SCOPE])[0]
        else:
            found = google.auth.default(scopes=[SCOPE])[0]
    except google.auth.exceptions.DefaultCredentialsError:
        if file := options.credentials_file or os.environ.get("GOOGLE_APPLICATION_CREDENTIALS"):
            raise FixRequest(f"the credentials file cannot be used: {file}", url, _HINT) from None
        raise MissingCredentials("no Google credentials were found", url, _HINT) from None
    except OSError as error:
        raise FixRequest(f"the credentials file cannot be read: {error.strerror}", url, _HINT) from None
    return _through(options.proxy_url, found) if options.proxy_url else found


def _through(proxy_url: str, found: Credentials) -> Credentials:
    """`found`, renewed through the proxy by whoever renews them; the metadata service is reached without."""
    import requests
    from google.auth.transport.requests import Request

    session = requests.Session()
    session.proxies["https"] = proxy_url
    renew = found.refresh
    # gcsfs brings a session of its own, which nobody can configure.
    found.refresh = lambda request: renew(Request(session))  # type: ignore[method-assign] # noqa: ARG005
    return found


def for_emulators() -> dict[str, Any]:
    """A token that only an emulator takes."""
    return {"token": "emulator", "expires_at": None}


class CredentialProvider:
    """Gives obstore a token, renewed when it runs out, so that a long save outlives it."""

    def __init__(self, found: Credentials) -> None:
        self._credentials = found

    def __call__(self) -> dict[str, Any]:
        from google.auth.transport.requests import Request

        if not self._credentials.valid and getattr(self._credentials, "refresh_token", True):
            self._credentials.refresh(Request())
        expiry = self._credentials.expiry
        return {"token": self._credentials.token, "expires_at": expiry.replace(tzinfo=UTC) if expiry else None}
