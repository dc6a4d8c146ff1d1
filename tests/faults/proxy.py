"""The fault server as a proxy: what goes well is answered by a real server behind it, and faults lie in between."""

import http.client
import urllib.parse

from tests.faults.dialect import Answer
from tests.faults.server import FaultServer

_OURS = {"connection", "content-length", "transfer-encoding", "date", "server"}
"""Headers of the connection on either side, not of the answer."""


class Upstream:
    """Hands requests on as they came, signature and all."""

    def __init__(self, endpoint_url):
        url = urllib.parse.urlsplit(endpoint_url)
        self._host, self._port = url.hostname, url.port

    def answer(self, request):
        connection = self._begun(request)
        try:
            connection.send(request.body)
            response = connection.getresponse()
            body = response.read()
        finally:
            connection.close()
        headers = {name: value for name, value in response.getheaders() if name.lower() not in _OURS}
        if request.method == "HEAD":
            # Only its length is told.
            body = bytes(int(response.getheader("Content-Length", 0)))
        return Answer(response.status, body, headers)

    def cut(self, request):
        """Hands on the half of a body that came, and leaves."""
        connection = self._begun(request)
        connection.send(request.body)
        connection.close()

    def _begun(self, request):
        connection = http.client.HTTPConnection(self._host, self._port, timeout=30)
        connection.putrequest(request.method, request.target, skip_host=True, skip_accept_encoding=True)
        for name, value in request.headers.items():
            if name not in {"connection", "expect"}:
                connection.putheader(name, value)
        connection.endheaders()
        return connection


class FaultProxy(FaultServer):
    """In front of `server`, one of localstack's; for one `with` block."""

    def __init__(self, server):
        super().__init__()
        self.dialect = Upstream(server.endpoint_url)
        self._behind = server

    @property
    def env(self):
        return {**self._behind.env, "AWS_ENDPOINT_URL": self.url}

    def create_bucket(self, bucket):
        self._behind.create_bucket(bucket)


def cut_on_the_way_up(exchange):
    """A rule for the middle of a body: both sides see the connection end there."""
    exchange.server.dialect.cut(exchange.request)
    exchange.reset()


def cut_on_the_way_down(exchange):
    """A reset in the middle of the answer."""
    answer = exchange.answer()
    exchange.send(answer, cut=len(answer.body) - len(answer.body) // 2)
    exchange.reset()


def stalled_on_the_way_down(exchange):
    """Half of the answer, and then silence."""
    answer = exchange.answer()
    exchange.send(answer, cut=len(answer.body) - len(answer.body) // 2)
    exchange.server.released.wait(60)
    exchange.reset()
