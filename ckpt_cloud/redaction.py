"""Text without the secrets that it may hold, for messages."""

from __future__ import annotations

import re

_QUERY = re.compile(r"\?[^\s'\"<>]*")
_SAID = re.compile(r"<(?:Code|Message)>([^<]{1,300})</")
_NAMED_SECRET = re.compile(
    r"(authorization|[\w-]*(?:token|secret|password|signature|credential|access-?key|account-?key|customer-key)[\w-]*|\bsig)"
    r"(['\"]?\s*[:=]\s*['\"]?)(?:(?:AWS4-HMAC-SHA256|Bearer|SharedKey|AWS)\s+)?[^\s'\"<>&;,]+",
    re.IGNORECASE,
)
# A password may hold a slash, as AWS's do; what follows the colon of a host is its port.
_USERINFO = re.compile(r"(?<=://)(?:[^/\s]+|[^/@:\s]+:(?!\d+/)[^@\s]+)@")


def redacted(text: str) -> str:
    """`text` without what follows a `?` and without a user and password before an `@`: both may hold secrets."""
    return _USERINFO.sub("", _QUERY.sub("?…", text))


def scrubbed(text: str) -> str:
    """What a store said, without what it may have repeated of the request.

    S3 answers a wrong signature with the whole canonical request, the session token in it; Azure does alike. Of markup
    only its `Code` and `Message` stay, and of anything else no value that follows the name of a secret.
    """
    before, markup, body = text.partition("<")
    if markup:
        before += " ".join(found[1] for found in _SAID.finditer(markup + body))
    return _NAMED_SECRET.sub(r"\1\2…", redacted(before))
