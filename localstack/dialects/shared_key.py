"""Azure's Shared Key signature, for the account that every emulator has.

See "Authorize with Shared Key" in the REST reference of Azure Storage.
"""

from __future__ import annotations

import base64
import hmac
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import format_datetime
from urllib.parse import parse_qsl, urlsplit
from urllib.request import Request

# Published by Microsoft, so no secret.
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
_API_VERSION = "2021-12-02"
# In the order in which they are signed, empty where the request has none; the date is sent as x-ms-date.
_STANDARD_HEADERS = (
    "content-encoding",
    "content-language",
    "content-length",
    "content-md5",
    "content-type",
    "date",
    "if-modified-since",
    "if-match",
    "if-none-match",
    "if-unmodified-since",
    "range",
)


def signed(method: str, url: str, data: bytes | None = None, headers: Mapping[str, str] | None = None) -> Request:
    """A request to `url`, whose path begins with the account; `data` is the body, None for none."""
    sent = {name.lower(): value for name, value in (headers or {}).items()}
    sent |= {"x-ms-date": format_datetime(datetime.now(UTC), usegmt=True), "x-ms-version": _API_VERSION}
    if data is not None:
        sent["content-type"] = "application/octet-stream"
    # urllib sends the length itself; an empty body is signed as no length at all.
    text = _string_to_sign(method, url, {**sent, "content-length": str(len(data)) if data else ""})
    digest = hmac.digest(base64.b64decode(KEY), text.encode(), "sha256")
    sent["authorization"] = f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}"
    return Request(url, data, sent, method=method)


def _string_to_sign(method: str, url: str, headers: Mapping[str, str]) -> str:
    standard = [headers.get(name, "") for name in _STANDARD_HEADERS]
    extensions = [f"{name}:{value}" for name, value in sorted(headers.items()) if name.startswith("x-ms-")]
    parts = urlsplit(url)
    # The account comes twice: the rule puts it before the path, and an emulator has it in the path.
    resource = [f"/{ACCOUNT}{parts.path}", *(f"{name}:{value}" for name, value in sorted(parse_qsl(parts.query)))]
    return "\n".join([method, *standard, *extensions, *resource])
