"""The way to a server: its address, whom to trust on it, and what is said where it ends without an answer."""

from __future__ import annotations

import os
import re
import ssl
from functools import lru_cache

from ckpt_cloud.errors import FixRequest, StoreUnavailable

HINT = "check the endpoint, the network and proxies on the way, then try again"
UNDECIDED = (408, 409, 425, 444, 460, 499)
"""Statuses below 500 that do not say that nothing was done: too late, in a race, or a proxy's (nginx's 444 and 499, an
AWS load balancer's 460) that lost one side after the request had gone on."""
_SERVER = re.compile(r"https?://[^/\s'\"?]+")
_REASONS = {
    "refused": re.compile(r"refused", re.IGNORECASE),
    "no such host": re.compile(r"dns error|gaierror|name resolution|name or service not known", re.IGNORECASE),
    "reset": re.compile(r"reset by peer|ConnectionReset|ServerDisconnected|Connection was closed", re.IGNORECASE),
    "no TLS there": re.compile(r"WRONG_VERSION_NUMBER|InvalidContentType|RECORD_LAYER_FAILURE"),
    "timed out": re.compile(r"timed ?out|TimeoutError", re.IGNORECASE),
}
_ADDRESS = re.compile(
    r"https?://(?:[^/\s]*@)?[^/\s:@]+(?::\d+)?(?:/\S*)?|https?://\[[0-9a-fA-F:.]+\](?::\d+)?(?:/\S*)?"
)


def unanswered(operation: str, url: str, words: str | BaseException) -> StoreUnavailable:
    """For a request that got no answer, or a broken one; `words` are what the library says, or its error."""
    text = words if isinstance(words, str) else _chain(words)
    server = _SERVER.search(text)
    reason = next((reason for reason, signs in _REASONS.items() if signs.search(text)), "refused, reset or timed out")
    where = f" from {server[0]}" if server else ""
    return StoreUnavailable(f"{operation}: no answer{where} ({reason})", url, HINT)


def address(text: str, name: str, url: str) -> str:
    """`text`, of the option `name`, as the address of a server, without a slash at its end.

    Raises:
        FixRequest: no request could be sent there.
    """
    if not _ADDRESS.fullmatch(text):
        raise FixRequest(f"the {name} {text!r} is no address of a server", url, "write it as http[s]://host[:port]")
    return text.rstrip("/")


def authorities(path: str, url: str) -> str:
    """`path`, of a PEM file with certificate authorities.

    Raises:
        FixRequest: it cannot be used.
    """
    try:
        _read(path, os.stat(path).st_mtime_ns)
    except OSError as error:
        why = "it has no certificate" if isinstance(error, ssl.SSLError) else error.strerror
        hint = "set ca_bundle, or AWS_CA_BUNDLE on S3, to a PEM file"
        raise FixRequest(f"the CA bundle {path} cannot be used: {why}", url, hint) from None
    return path


@lru_cache(maxsize=16)
def _read(path: str, modified_ns: int) -> None:
    """Reads the certificates, which takes some 20 ms; once for each version of the file."""
    del modified_ns
    ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)


def _chain(error: BaseException | None) -> str:
    """An error and all that led to it; each library wraps what the socket said in its own way."""
    said = []
    while error is not None:
        said.append(f"{error!r} {error}")
        error = error.__cause__ or error.__context__
    return "\n".join(said)
