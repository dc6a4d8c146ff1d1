"""Object-store servers on this machine, for tests, the demo, benchmarks, and anyone: docs/local-stores.md.

with localstack.start("seaweedfs") as server:
    server.create_bucket("checkpoints")
    os.environ.update(server.env)
"""

from __future__ import annotations

from localstack.errors import BucketRefused, LocalServerError, NotInstalled, StartFailed, UnknownServer
from localstack.server import Server, missing, names, start

__all__ = [
    "BucketRefused",
    "LocalServerError",
    "NotInstalled",
    "Server",
    "StartFailed",
    "UnknownServer",
    "missing",
    "names",
    "start",
]
