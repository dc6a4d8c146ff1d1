"""As much of S3's dialect as a checkpoint needs, on a dictionary: a request in, an answer out, no network."""

import base64
import hashlib
import itertools
import re
import threading
import time
import zlib
from dataclasses import dataclass, field
from email.utils import formatdate
from xml.sax.saxutils import escape

import crc32c

_XML = '<?xml version="1.0" encoding="UTF-8"?>\n'


@dataclass
class Request:
    method: str
    bucket: str
    key: str
    query: dict
    headers: dict
    body: bytes
    target: str = ""
    """As it was asked for, for whoever hands it on."""


@dataclass
class Answer:
    status: int
    body: bytes = b""
    headers: dict = field(default_factory=dict)


def refusal(status, code, extra="", headers=None):
    """S3's way to say no."""
    body = f"{_XML}<Error><Code>{code}</Code><Message>on demand</Message>{extra}</Error>".encode()
    return Answer(status, body, {"Content-Type": "application/xml", **(headers or {})})


class Dialect:
    """Objects by `bucket/key`, uploads by id."""

    def __init__(self):
        self.buckets = set()
        self.objects = {}
        self.uploads = {}
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()

    def answer(self, request):
        with self._lock:
            if request.bucket not in self.buckets:
                return refusal(404, "NoSuchBucket")
            if not request.key:
                return self._of_bucket(request)
            return getattr(self, f"_{request.method.lower()}")(request)

    def _of_bucket(self, request):
        if "delete" in request.query:
            keys = re.findall(r"<Key>(.*?)</Key>", request.body.decode())
            for key in keys:
                self.objects.pop(f"{request.bucket}/{key}", None)
            deleted = "".join(f"<Deleted><Key>{key}</Key></Deleted>" for key in keys)
            return self._xml("DeleteResult", deleted)
        prefix, delimiter = request.query.get("prefix", ""), request.query.get("delimiter")
        contents, folders = "", set()
        for name, (data, e_tag, _) in sorted(self.objects.items()):
            bucket, _, key = name.partition("/")
            if bucket != request.bucket or not key.startswith(prefix):
                continue
            if delimiter and delimiter in key[len(prefix) :]:
                folders.add(prefix + key[len(prefix) :].partition(delimiter)[0] + delimiter)
                continue
            contents += (
                f"<Contents><Key>{escape(key)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
                f"<ETag>{escape(e_tag)}</ETag><Size>{len(data)}</Size></Contents>"
            )
        common = "".join(f"<CommonPrefixes><Prefix>{escape(f)}</Prefix></CommonPrefixes>" for f in sorted(folders))
        return self._xml(
            "ListBucketResult", f"<Name>{request.bucket}</Name><IsTruncated>false</IsTruncated>{contents}{common}"
        )

    def _put(self, request):
        wrong = _wrong_checksum(request)
        if wrong:
            return refusal(400, wrong)
        if "uploadId" in request.query:
            parts = self.uploads.get(request.query["uploadId"])
            if parts is None:
                return refusal(404, "NoSuchUpload")
            parts[int(request.query["partNumber"])] = request.body
            return Answer(200, headers={"ETag": _e_tag(request.body, 0)})
        return self._condition(request) or self._store(request, request.body)

    def _condition(self, request):
        here = self.objects.get(f"{request.bucket}/{request.key}")
        generation = request.headers.get("x-goog-if-generation-match")
        if generation is not None:
            return None if generation == _generation(here) else refusal(412, "PreconditionFailed")
        if request.headers.get("if-none-match") == "*" and here:
            return refusal(412, "PreconditionFailed")
        expected = request.headers.get("if-match")
        if expected is None or (here and here[1] == expected):
            return None
        return refusal(412, "PreconditionFailed") if here else refusal(404, "NoSuchKey")

    def _store(self, request, data):
        e_tag = _e_tag(data, next(self._numbers))
        self.objects[f"{request.bucket}/{request.key}"] = (data, e_tag, time.time())
        here = self.objects[f"{request.bucket}/{request.key}"]
        return Answer(200, headers={"ETag": e_tag, "x-goog-generation": _generation(here)})

    def _get(self, request):
        here = self.objects.get(f"{request.bucket}/{request.key}")
        if here is None:
            return refusal(404, "NoSuchKey")
        data, e_tag, modified = here
        if request.headers.get("if-match", e_tag) != e_tag:
            return refusal(412, "PreconditionFailed")
        headers = {"ETag": e_tag, "Last-Modified": formatdate(modified, usegmt=True), "Accept-Ranges": "bytes"}
        headers["x-goog-generation"] = _generation(here)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
        if not wanted:
            return Answer(200, data, headers)
        start, end = int(wanted[1]), min(len(data), int(wanted[2] or len(data)) + 1)
        if start >= len(data):
            return refusal(416, "InvalidRange")
        return Answer(206, data[start:end], {**headers, "Content-Range": f"bytes {start}-{end - 1}/{len(data)}"})

    _head = _get

    def _delete(self, request):
        if "uploadId" in request.query:
            self.uploads.pop(request.query["uploadId"], None)
        else:
            self.objects.pop(f"{request.bucket}/{request.key}", None)
        return Answer(204)

    def _post(self, request):
        if "uploads" in request.query:
            upload = f"upload-{next(self._numbers)}"
            self.uploads[upload] = {}
            return self._xml("InitiateMultipartUploadResult", f"<UploadId>{upload}</UploadId>")
        parts = self.uploads.pop(request.query["uploadId"], None)
        if parts is None:
            return refusal(404, "NoSuchUpload")
        numbers = [int(number) for number in re.findall(r"<PartNumber>(\d+)</PartNumber>", request.body.decode())]
        assert numbers == sorted(parts), "the parts that were uploaded, in order"
        stored = self._store(request, b"".join(parts[number] for number in numbers))
        e_tag = escape(stored.headers["ETag"])
        done = self._xml("CompleteMultipartUploadResult", f"<ETag>{e_tag}</ETag>")
        done.headers["x-goog-generation"] = stored.headers["x-goog-generation"]
        return done

    @staticmethod
    def _xml(root, inside):
        return Answer(200, f"{_XML}<{root}>{inside}</{root}>".encode(), {"Content-Type": "application/xml"})


def _generation(stored):
    """Google's number of a version; 0 for nothing."""
    return stored[1].strip('"').rpartition("-")[2] if stored else "0"


def _e_tag(data, number):
    return f'"{hashlib.md5(data).hexdigest()}-{number}"'


def _wrong_checksum(request):
    given = {
        "content-md5": lambda data: hashlib.md5(data).digest(),
        "x-amz-checksum-sha256": lambda data: hashlib.sha256(data).digest(),
        "x-amz-checksum-crc32": lambda data: zlib.crc32(data).to_bytes(4, "big"),
        "x-amz-checksum-crc32c": lambda data: crc32c.crc32c(data).to_bytes(4, "big"),
        "x-amz-checksum-crc64nvme": lambda data: crc64nvme(data).to_bytes(8, "big"),
    }
    for name, compute in given.items():
        if name in request.headers and base64.b64decode(request.headers[name]) != compute(request.body):
            return "BadDigest"
    return None


def crc64nvme(data):
    """CRC-64/NVME (NVM Express NVM Command Set Specification 1.0d, section 5.2.1.3.4)."""
    crc = 0xFFFFFFFFFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFFFFFFFFFF


def _entry(byte):
    for _ in range(8):
        byte = byte >> 1 ^ (0x9A6C9329AC4BC9B5 if byte & 1 else 0)
    return byte


_TABLE = [_entry(byte) for byte in range(256)]
