"""One HTTP request, for the protocols that need no client library here."""

from __future__ import annotations

from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

_TIMEOUT_S = 5


class Refused(OSError):
    """The server answered with `status`, and `body` saying why."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(status, body)
        self.status, self.body = status, body

    def __str__(self) -> str:
        return f"HTTP {self.status}: {self.body.decode(errors='replace')}"


def call(request: Request) -> bytes:
    """The body of the answer; straight to this machine, whatever proxy is configured.

    Raises:
        Refused: an answer that is not a success.
        OSError: no answer within 5 seconds.
    """
    try:
        with build_opener(ProxyHandler({})).open(request, timeout=_TIMEOUT_S) as answer:
            return bytes(answer.read())
    except HTTPError as refused:
        with refused:
            raise Refused(refused.code, refused.read()) from None
