"""What the fsspec engine tells Google of what it uploads, held against what arrives, as Google holds it."""

import base64
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from crc32c import crc32c

from ckpt_cloud.errors import CkptCloudError
from ckpt_cloud.options import RetryOptions, StoreOptions
from ckpt_cloud.stores import open_store, parse_url
from tests.stores.conformance import MIB, stream


class Google(ThreadingHTTPServer):
    """Takes uploads of JSON's form in one request each, and refuses what has another CRC32C than they say."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        # All change with what is sent: objects, what was said to be wrong, and the upload in which a bit flips.
        self.objects, self.refused, self.flipped_at = {}, [], None


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        boundary = re.search('boundary="(.+)"', self.headers["Content-Type"])[1].encode()
        about, data = (part.split(b"\r\n\r\n", 1)[1][:-2] for part in body.split(b"--" + boundary)[1:3])
        told = json.loads(about)
        if self.server.flipped_at is not None and self.server.flipped_at in told["name"]:
            data = data[:-1] + bytes([data[-1] ^ 1])
        if base64.b64decode(told["crc32c"]) != crc32c(data).to_bytes(4, "big"):
            self.server.refused.append(told["name"])
            self._answer(400, {"error": {"code": 400, "message": "Provided CRC32C does not match"}})
            return
        self.server.objects[told["name"]] = data
        self._answer(200, {"name": told["name"], "size": str(len(data)), "generation": "1", "crc32c": told["crc32c"]})

    def do_DELETE(self):
        self._answer(204, None)

    def do_GET(self):
        self._answer(404, {"error": {"code": 404, "message": "Not Found"}})

    def _answer(self, status, document):
        body = b"" if document is None else json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Says nothing."""


@pytest.fixture
def google(monkeypatch):
    server = Google()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def store(google):
    options = StoreOptions(engine="fsspec", retry=RetryOptions(max_retries=0, deadline_s=10))
    return open_store(parse_url("gs://bucket/run"), options)


async def test_a_bit_that_flips_on_the_way_is_noticed_at_once(google, store):
    await store.put("small", b"right")
    google.flipped_at = "run/other"
    with pytest.raises(CkptCloudError):
        await store.put("other", b"right")
    assert google.refused == ["run/other"]
    assert google.objects == {"run/small": b"right"}


async def test_so_it_is_in_a_part_of_many(google, store):
    google.flipped_at = "00001"
    with pytest.raises(CkptCloudError):
        await store.put_multipart("large", stream(bytes(11 * MIB)), part_size=5 * MIB, concurrency=2)
    assert google.refused
    assert all(name.endswith("00001") for name in google.refused)
    assert "run/large" not in google.objects
