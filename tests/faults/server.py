"""The server: HTTP around the dialect, and faults that are switched on while it runs."""

import contextlib
import itertools
import socket
import ssl
import struct
import threading
import urllib.parse
from collections import Counter
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.faults.dialect import Answer, Dialect, Request, refusal


@dataclass
class Fault:
    """One rule: which requests, and what becomes of them."""

    act: object
    method: str | None
    key: str
    query: str | None
    times: float
    after: int
    midway: bool = False
    hits: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def takes(self, request):
        if self.method not in (None, request.method) or not fnmatchcase(request.key, self.key):
            return False
        if self.query is not None and self.query not in request.query:
            return False
        with self._lock:
            self.after -= 1
            if self.after >= 0 or self.hits >= self.times:
                return False
            self.hits += 1
        return True


class FaultServer:
    """An S3 server on 127.0.0.1, path-style, for one `with` block.

    `fault(act, ...)` has the next requests that match go wrong; the functions below are the ways to. As a proxy it
    leads to the server `tunnel_to`, whatever host is asked for (`tunnels`).
    """

    def __init__(self, *, tls=None):
        self.dialect = Dialect()
        self.requests = []
        self.peak_in_flight = 0
        self.most_in_flight = None
        self.hold_s = 0.01
        self.released = threading.Event()
        self.tunnels = []
        self.tunnel_to = None
        self._faults = []
        self._in_flight = 0
        self._lock = threading.Lock()
        self._http = _HTTP(("127.0.0.1", 0), _Handler)
        self._http.server = self
        if tls:
            self._http.socket = tls.wrap_socket(self._http.socket, server_side=True, do_handshake_on_connect=False)
        self._scheme = "https" if tls else "http"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self.released.set()
        self._http.shutdown()
        self._http.close_all()
        self._http.server_close()
        self._thread.join()

    @property
    def url(self):
        return f"{self._scheme}://127.0.0.1:{self._http.server_port}"

    @property
    def env(self):
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "someone",
            "AWS_SECRET_ACCESS_KEY": "hunter2hunter2",
            "AWS_REGION": "us-east-1",
        }

    def create_bucket(self, bucket):
        self.dialect.buckets.add(bucket)

    def fault(self, act, *, method=None, key="*", query=None, times=float("inf"), after=0, midway=False):
        """With `midway`, `act` has its turn when half of the request's body has come."""
        rule = Fault(act, method, key, query, times, after, midway)
        self._faults.append(rule)
        return rule

    def heal(self):
        self._faults.clear()

    def count(self, method=None, query=None):
        return sum(method in (None, r.method) and (query is None or query in r.query) for r in self.requests)

    def outcomes(self):
        """How many requests of each method."""
        return Counter(request.method for request in self.requests)

    def due(self, request, *, midway):
        return next((rule for rule in list(self._faults) if rule.midway == midway and rule.takes(request)), None)

    def handle(self, exchange):
        request = exchange.request
        with self._lock:
            self.requests.append(request)
            self._in_flight += 1
            self.peak_in_flight = max(self.peak_in_flight, self._in_flight)
            crowded = self.most_in_flight is not None and self._in_flight > self.most_in_flight
        try:
            if self.most_in_flight is not None:
                # So that requests overlap; long enough to see how many do.
                self.released.wait(self.hold_s)
            if crowded:
                exchange.send(refusal(503, "SlowDown"))
                return
            rule = self.due(request, midway=False)
            (rule.act if rule else as_it_should)(exchange)
        finally:
            with self._lock:
                self._in_flight -= 1


class _HTTP(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, *args):
        super().__init__(*args)
        self._open = set()

    def process_request(self, request, client_address):
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request):
        self._open.discard(request)
        super().shutdown_request(request)

    def close_all(self):
        for connection in list(self._open):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def handle_error(self, request, client_address):
        """A client that went away, or a connection that was cut on purpose."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_anything(self):
        url = urllib.parse.urlsplit(self.path)
        bucket, _, key = urllib.parse.unquote(url.path.lstrip("/")).partition("/")
        query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, bucket, key, query, headers, b"", self.path)
        exchange = Exchange(self, request, self.server.server)
        midway = self.server.server.due(request, midway=True)
        length = int(headers.get("content-length", 0))
        if headers.get("transfer-encoding") == "chunked":
            request.body = self._chunks()
        else:
            request.body = self.rfile.read(length // 2 if midway else length)
        if midway:
            midway.act(exchange)
        else:
            self.server.server.handle(exchange)

    def do_CONNECT(self):
        self.server.server.tunnels.append(self.path)
        self.close_connection = True
        port = self.server.server.tunnel_to._http.server_port
        with socket.create_connection(("127.0.0.1", port)) as there:
            self.send_response(200)
            self.end_headers()
            answers = threading.Thread(target=_pump, args=(there, self.connection))
            answers.start()
            _pump(self.connection, there)
            answers.join()

    def _chunks(self):
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_anything  # noqa: N815 - http.server's names

    def log_message(self, *args):
        pass


def _pump(source, target):
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


class Exchange:
    """One request and the way to answer it."""

    def __init__(self, handler, request, server):
        self.handler, self.request, self.server = handler, request, server

    def answer(self):
        return self.server.dialect.answer(self.request)

    def send(self, answer, *, cut=0):
        """Sends `answer`; with `cut`, ends the connection so many bytes before the end of what it announced."""
        handler = self.handler
        handler.send_response(answer.status)
        for name, value in answer.headers.items():
            handler.send_header(name, value)
        if "Content-Length" not in answer.headers:
            handler.send_header("Content-Length", str(len(answer.body)))
        handler.end_headers()
        if self.request.method != "HEAD":
            handler.wfile.write(answer.body[: len(answer.body) - cut])
        if cut:
            handler.close_connection = True

    def reset(self):
        """Ends the connection with a TCP reset."""
        self.handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.handler.connection.close()
        self.handler.close_connection = True


def as_it_should(exchange):
    exchange.send(exchange.answer())


def refuse(status, code, extra="", headers=None):
    return lambda exchange: exchange.send(refusal(status, code, extra, headers))


def page(status):
    """What a proxy says that stands in between."""
    html = Answer(status, b"<!DOCTYPE html><html><body>Please log in</body></html>", {"Content-Type": "text/html"})
    return lambda exchange: exchange.send(html)


def error_in_200(code):
    """S3 may find out too late: the status has gone out."""
    return lambda exchange: exchange.send(Answer(200, refusal(500, code).body, {"Content-Type": "application/xml"}))


def reset(exchange):
    exchange.reset()


def reset_after_it_took_effect(exchange):
    exchange.answer()
    exchange.reset()


def refuse_after_it_took_effect(status):
    """As nginx logs 499: its client or its server was lost after the request had gone on."""

    def act(exchange):
        exchange.answer()
        exchange.send(Answer(status, b"<html>proxy</html>", {"Content-Type": "text/html"}))

    return act


def stall(exchange):
    """Never answers, until the server stops."""
    exchange.server.released.wait(60)
    exchange.reset()


def short(cut):
    return lambda exchange: exchange.send(exchange.answer(), cut=cut)


def shorter(missing):
    """A whole answer of fewer bytes than were asked for."""

    def act(exchange):
        answer = exchange.answer()
        answer.body = answer.body[:-missing]
        exchange.send(answer)

    return act


def whole_object(exchange):
    exchange.request.headers.pop("range", None)
    exchange.send(exchange.answer())


def another_range(exchange):
    answer = exchange.answer()
    exchange.send(Answer(206, answer.body[1:] + answer.body[:1], answer.headers))


def flipped(exchange):
    answer = exchange.answer()
    middle = len(answer.body) // 2
    answer.body = answer.body[:middle] + bytes([answer.body[middle] ^ 1]) + answer.body[middle + 1 :]
    exchange.send(answer)


def flipped_on_the_way_up(exchange):
    body = exchange.request.body
    exchange.request.body = body[:-1] + bytes([body[-1] ^ 1])
    as_it_should(exchange)


def in_turn(*acts):
    """Each request the next of `acts`, then as it should be."""
    queue = itertools.chain(acts, itertools.repeat(as_it_should))
    lock = threading.Lock()

    def act(exchange):
        with lock:
            now = next(queue)
        now(exchange)

    return act


def server_context(cert, key):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    return context
