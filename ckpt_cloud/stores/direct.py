"""Ranged reads straight into the caller's memory, over HTTP connections of our own (RFC 9110, section 14.4).

obstore hands bytes over in memory of its own, from which they would be copied, at twice the CPU time. Here the kernel
writes them where they belong. Only the plain case is done here: after anything else obstore asks, and says what is
wrong.
"""

from __future__ import annotations

import asyncio
import http.client
import io
import os
import socket
import ssl
import struct
import threading
import time
import urllib.parse
import urllib.request
import weakref
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

from ckpt_cloud.workers import in_waiting_thread

_SIGNED_FOR_S = 60.0
"""A signed URL serves all ranges of an object for this long; its signature lasts longer."""
_IDLE_S = 20.0
"""Connections that were not used for this long are not used again: what is in between may have forgotten them."""
_MOST_FAILURES = 3
"""In a row, after which this way is left alone for a while: there may be something between us and the store."""
_REST_S = 60.0
_THE_STORES_OWN = frozenset({404, 412, 416})
"""Answers that say nothing against this way."""


class DirectReads:
    """Reads of one bucket's objects.

    Args:
        sign: the URL of a key, good for some minutes.
        connect_timeout_s: for a connection to be made.
        stalled_s: the longest that a body may bring nothing; twice that may pass until it is noticed.
        timeout_s: for one whole read.
        proxy_url: the user's; with one, or one in the environment, nothing is read this way.
        ca: path of a PEM file with further certificate authorities.
    """

    def __init__(
        self,
        sign: Callable[[str], Awaitable[str]],
        *,
        connect_timeout_s: float,
        stalled_s: float,
        timeout_s: float,
        proxy_url: str | None = None,
        ca: str | None = None,
    ) -> None:
        self._sign = sign
        self._timeout_s = timeout_s
        self._proxy_url = proxy_url
        self._connections = _Connections(connect_timeout_s, stalled_s, ca)
        # What changes, all of it on the loop: whether there is a proxy, URLs with the time of their signature in the
        # order of it, failures in a row, and until when this way is left alone.
        self._no_proxy: bool | None = None
        self._urls: dict[str, tuple[str, float]] = {}
        self._failures = 0
        self._rests_until = 0.0

    async def read(self, key: str, start: int, end: int, into: Sequence[memoryview], version: str | None) -> bool:
        """Fills `into`, one after another, with the object's bytes from `start` to `end`; whether it did.

        Nothing is written to `into` any more once this returns, or is cancelled.
        """
        if time.monotonic() < self._rests_until:
            return False
        url = await self._url(key)
        if url is None or not self._reaches(url):
            return False
        request = _Request(url, start, end, into, version)
        done = await self._read(request)
        if done or request.status in _THE_STORES_OWN:
            self._failures = 0
            return done
        # Its signature may be what was refused.
        self._urls.pop(key, None)
        self._failures += 1
        if self._failures >= _MOST_FAILURES:
            self._rests_until = time.monotonic() + _REST_S
        return False

    async def _read(self, request: _Request) -> bool:
        reading = asyncio.ensure_future(in_waiting_thread(self._connections.read, request))
        try:
            async with asyncio.timeout(self._timeout_s):
                return await asyncio.shield(reading)
        except TimeoutError:
            return False
        finally:
            await _end(request, reading)

    def _reaches(self, url: str) -> bool:
        if self._no_proxy is None:
            self._no_proxy = _reached_directly(url, self._proxy_url)
        return self._no_proxy

    async def _url(self, key: str) -> str | None:
        """None if there is none to be had: obstore will say why."""
        self._forget_old_urls()
        if key not in self._urls:
            try:
                url = await self._sign(key)
            except Exception:  # noqa: BLE001 - credentials that cannot be had, in any of many ways
                return None
            self._urls.pop(key, None)
            self._urls[key] = (url, time.monotonic())
        return self._urls[key][0]

    def _forget_old_urls(self) -> None:
        oldest = time.monotonic() - _SIGNED_FOR_S
        while self._urls:
            key = next(iter(self._urls))
            if self._urls[key][1] > oldest:
                return
            del self._urls[key]


class _Connections:
    """Those of one store; used on threads that may wait."""

    def __init__(self, connect_timeout_s: float, stalled_s: float, ca: str | None) -> None:
        self._connect_timeout_s = connect_timeout_s
        self._stalled_s = stalled_s
        self._ca = ca
        self._lock = threading.Lock()
        # What changes: connections that nobody uses now, with the time since when, and what TLS is made with.
        self._idle: list[tuple[http.client.HTTPConnection, float]] = []
        self._context: ssl.SSLContext | None = None
        weakref.finalize(self, _close_all, self._idle).atexit = False

    def read(self, request: _Request) -> bool:
        """Whether all bytes came."""
        with suppress(OSError, http.client.HTTPException, ValueError):
            if request.stopped:
                return False
            connection = self._unused()
            if connection is not None and request.read(connection):
                return self._keep(connection)
            if connection is None or request.may_have_met_a_closed_connection:
                connection = self._connect(request.url)
                return request.read(connection) and self._keep(connection)
        return False

    def _unused(self) -> http.client.HTTPConnection | None:
        with self._lock:
            oldest = time.monotonic() - _IDLE_S
            while self._idle and self._idle[0][1] < oldest:
                self._idle.pop(0)[0].close()
            return self._idle.pop()[0] if self._idle else None

    def _keep(self, connection: http.client.HTTPConnection) -> bool:
        if connection.sock is not None:
            with self._lock:
                self._idle.append((connection, time.monotonic()))
        return True

    def _connect(self, url: str) -> http.client.HTTPConnection:
        parts = urllib.parse.urlsplit(url)
        host = parts.hostname or ""
        connection: http.client.HTTPConnection
        if parts.scheme == "https":
            connection = http.client.HTTPSConnection(
                host, parts.port or 443, timeout=self._connect_timeout_s, context=self._tls()
            )
        else:
            connection = http.client.HTTPConnection(host, parts.port or 80, timeout=self._connect_timeout_s)
        try:
            connection.connect()
        except BaseException:
            # A handshake that fails leaves the socket open.
            connection.close()
            raise
        connection.sock.settimeout(self._stalled_s)
        if _waits_in_the_kernel(connection.sock):
            seconds, rest = divmod(self._stalled_s, 1)
            limit = struct.pack("ll", int(seconds), int(rest * 1e6))
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        return connection

    def _tls(self) -> ssl.SSLContext:
        with self._lock:
            if self._context is None:
                context = ssl.create_default_context()
                if self._ca:
                    context.load_verify_locations(self._ca)
                self._context = context
            return self._context


class _Request:
    """One ranged GET, which another thread may stop."""

    def __init__(self, url: str, start: int, end: int, into: Sequence[memoryview], version: str | None) -> None:
        self.url = url
        self._range = (start, end)
        self._into = into
        self._headers = {"Range": f"bytes={start}-{end - 1}"} | ({"If-Match": version} if version else {})
        self._lock = threading.Lock()
        # What changes: the answer's status, whether nobody waits any more, whether nothing came for too long, and the
        # socket in use.
        self.status: int | None = None
        self.stopped = False
        self._stalled = False
        self._socket: socket.socket | None = None

    @property
    def may_have_met_a_closed_connection(self) -> bool:
        """Whether a fresh one may do better: the store had closed this one, and said nothing."""
        return self.status is None and not self._stalled and not self.stopped

    def read(self, connection: http.client.HTTPConnection) -> bool:
        """Whether all bytes came; a connection on which they did not is closed."""
        done = False
        try:
            done = self._begin(connection.sock) and self._exchange(connection)
        except (OSError, http.client.HTTPException) as error:
            self._stalled = isinstance(error, TimeoutError | BlockingIOError)
        finally:
            with self._lock:
                self._socket = None
                done = done and not self.stopped
            if not done:
                connection.close()
        return done

    def stop(self) -> bool:
        """Ends a read that waits for the network, and lets none begin; whether one is under way."""
        with self._lock:
            self.stopped = True
            if self._socket is None:
                return False
            with suppress(OSError):
                # Not SSLSocket's own, after which a read goes on without TLS.
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)
            return True

    def _begin(self, used: socket.socket | None) -> bool:
        with self._lock:
            # Kept, since http.client lets go of a socket that the store will close after its answer.
            self._socket = used
            return used is not None and not self.stopped

    def _exchange(self, connection: http.client.HTTPConnection) -> bool:
        parts = urllib.parse.urlsplit(self.url)
        connection.request("GET", f"{parts.path}?{parts.query}", headers=self._headers)
        response = connection.getresponse()
        try:
            return self._receive(response)
        finally:
            # Of what was left unread there is no use either.
            response.close()

    def _receive(self, response: http.client.HTTPResponse) -> bool:
        self.status = response.status
        start, end = self._range
        came = response.getheader("Content-Range", "").partition("/")[0]
        if response.status != http.HTTPStatus.PARTIAL_CONTENT or came != f"bytes {start}-{end - 1}":
            return False
        if response.length != end - start:
            return False
        if self._socket is not None and _waits_in_the_kernel(self._socket):
            return _filled(self._into, response.fp, self._socket)
        return all(response.readinto(view) == len(view) for view in self._into) and not response.length


def _waits_in_the_kernel(used: socket.socket) -> bool:
    """Whether one call can fill a buffer: without TLS, on POSIX."""
    return type(used) is socket.socket and os.name == "posix"


def _filled(into: Sequence[memoryview], ahead: io.BufferedReader, used: socket.socket) -> bool:
    """Fills `into` with what was read ahead with the headers, then from the socket; whether all bytes came.

    Hundreds of calls for each range, as http.client makes them, cost as much as the bytes themselves.
    """
    stalled_s = used.gettimeout()
    # Python would wait for the first bytes itself, and then take what there is; now SO_RCVTIMEO limits the wait. A call
    # that it ends gives what came until then, and is only an error when that is nothing.
    used.settimeout(None)
    for view in into:
        at = ahead.readinto1(view)
        if at is None:
            raise TimeoutError("nothing came behind the headers")
        while at < len(view):
            came = used.recv_into(view[at:], 0, socket.MSG_WAITALL)
            if not came:
                return False
            at += came
    used.settimeout(stalled_s)
    return True


async def _end(request: _Request, reading: asyncio.Future[bool]) -> None:
    """Returns when nothing more is written, whatever ended the wait, and however often this one is cancelled.

    A thread that only connects is not waited for: it will find that nobody wants its connection.
    """
    cancelled: asyncio.CancelledError | None = None
    while request.stop() and not reading.done():
        try:
            await asyncio.wait([reading])
        except asyncio.CancelledError as again:
            cancelled = again
    reading.cancel()
    if cancelled is not None:
        raise cancelled


def _close_all(connections: list[tuple[http.client.HTTPConnection, float]]) -> None:
    for connection, _ in connections:
        connection.close()


def _reached_directly(url: str, proxy_url: str | None) -> bool:
    """Whether no proxy stands between this process and the host of `url`."""
    parts = urllib.parse.urlsplit(url)
    if proxy_url or not parts.hostname:
        return False
    proxies = urllib.request.getproxies()
    return not (parts.scheme in proxies or "all" in proxies) or bool(urllib.request.proxy_bypass(parts.hostname))
