"""Ranged reads straight into the caller's memory, over HTTP connections of our own (RFC 9110, section 14.4).

obstore hands bytes over in memory of its own, from which they would be copied, at twice the CPU time. Here the kernel
writes them where they belong. Only the plain case is done here: after anything else obstore asks, and says what is
wrong.
"""

from __future__ import annotations

import asyncio
import http.client
import socket
import ssl
import threading
import time
import urllib.parse
import urllib.request
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress

from ckpt_cloud.workers import in_waiting_thread

STALLED_S = 30.0
"""A body that has brought nothing for this long has stopped coming."""
_SIGNED_FOR_S = 60.0
"""A signed URL serves all ranges of an object for this long; its signature lasts longer."""
_GIVE_UP_AFTER = 3
"""Failures in a row after which this way is left alone: there may be something between us and the store."""


class DirectReads:
    """Reads of one bucket's objects.

    Args:
        sign: the URL of a key, good for some minutes.
        connect_timeout_s: for a connection to be made.
        stalled_s: the longest that a body may bring nothing.
        ca: path of a PEM file with further certificate authorities.
    """

    def __init__(
        self, sign: Callable[[str], str], *, connect_timeout_s: float, stalled_s: float, ca: str | None = None
    ) -> None:
        self._sign = sign
        self._connect_timeout_s = connect_timeout_s
        self._stalled_s = stalled_s
        self._ca = ca
        self._lock = threading.Lock()
        # What changes: connections that nobody uses now, URLs with the time of their signature, failures in a row.
        self._idle: list[http.client.HTTPConnection] = []
        self._urls: dict[str, tuple[str, float]] = {}
        self._failures = 0
        weakref.finalize(self, _close_all, self._idle).atexit = False

    async def read(self, key: str, start: int, end: int, into: Sequence[memoryview], version: str | None) -> bool:
        """Fills `into`, one after another, with the object's bytes from `start` to `end`; whether it did.

        Nothing is written to `into` any more once this returns, or is cancelled.
        """
        if self._failures >= _GIVE_UP_AFTER:
            return False
        request = _Request(self._url(key), start, end, into, version)
        reading = asyncio.ensure_future(in_waiting_thread(self._read, request))
        try:
            done = await asyncio.shield(reading)
        except asyncio.CancelledError:
            request.stop()
            await asyncio.wait([reading])
            raise
        self._failures = 0 if done else self._failures + 1
        return done

    def _url(self, key: str) -> str:
        now = time.monotonic()
        url, signed = self._urls.get(key, ("", -_SIGNED_FOR_S))
        if now - signed >= _SIGNED_FOR_S:
            self._urls = {k: (u, at) for k, (u, at) in self._urls.items() if now - at < _SIGNED_FOR_S}
            url = self._sign(key)
            self._urls[key] = (url, now)
        return url

    def _read(self, request: _Request) -> bool:
        """On a thread that may wait."""
        with self._lock:
            connection = self._idle.pop() if self._idle else None
        if connection is not None and request.read(connection):
            return self._keep(connection)
        if request.stopped or (connection is not None and request.answered):
            return False
        # The store may have closed an idle connection; a fresh one tells.
        connection = self._connect(request.url)
        return request.read(connection) and self._keep(connection)

    def _keep(self, connection: http.client.HTTPConnection) -> bool:
        with self._lock:
            self._idle.append(connection)
        return True

    def _connect(self, url: str) -> http.client.HTTPConnection:
        parts = urllib.parse.urlsplit(url)
        assert parts.hostname is not None, "obstore signs whole URLs"
        connection: http.client.HTTPConnection
        if parts.scheme == "https":
            context = ssl.create_default_context()
            if self._ca:
                context.load_verify_locations(self._ca)
            connection = http.client.HTTPSConnection(
                parts.hostname, parts.port, timeout=self._connect_timeout_s, context=context
            )
        else:
            connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=self._connect_timeout_s)
        with suppress(OSError):
            connection.connect()
            connection.sock.settimeout(self._stalled_s)
        return connection


class _Request:
    """One ranged GET, which another thread may stop."""

    def __init__(self, url: str, start: int, end: int, into: Sequence[memoryview], version: str | None) -> None:
        self.url = url
        self._range = (start, end)
        self._into = into
        self._headers = {"Range": f"bytes={start}-{end - 1}"} | ({"If-Match": version} if version else {})
        # What changes: the connection in use, whether a status line came, and whether nobody waits any more.
        self._connection: http.client.HTTPConnection | None = None
        self.answered = False
        self.stopped = False

    def read(self, connection: http.client.HTTPConnection) -> bool:
        """Whether all bytes came; a connection on which they did not is closed."""
        self._connection = connection
        try:
            done = not self.stopped and connection.sock is not None and self._exchange(connection)
        except (OSError, http.client.HTTPException):
            done = False
        finally:
            self._connection = None
        if not done:
            connection.close()
        return done

    def stop(self) -> None:
        """Ends a read that waits for the network."""
        self.stopped = True
        connection = self._connection
        if connection is not None and connection.sock is not None:
            with suppress(OSError):
                connection.sock.shutdown(socket.SHUT_RDWR)

    def _exchange(self, connection: http.client.HTTPConnection) -> bool:
        parts = urllib.parse.urlsplit(self.url)
        connection.request("GET", f"{parts.path}?{parts.query}", headers=self._headers)
        response = connection.getresponse()
        self.answered = True
        start, end = self._range
        came = response.getheader("Content-Range", "").partition("/")[0]
        if response.status != http.HTTPStatus.PARTIAL_CONTENT or came != f"bytes {start}-{end - 1}":
            return False
        if response.length != end - start:
            return False
        return all(response.readinto(view) == len(view) for view in self._into) and not response.length


def _close_all(connections: list[http.client.HTTPConnection]) -> None:
    for connection in connections:
        connection.close()


def reached_directly(url: str, proxy_url: str | None) -> bool:
    """Whether no proxy stands between this process and the host of `url`."""
    parts = urllib.parse.urlsplit(url)
    if proxy_url or not parts.hostname:
        return False
    proxies = urllib.request.getproxies()
    return not (parts.scheme in proxies or "all" in proxies) or bool(urllib.request.proxy_bypass(parts.hostname))
