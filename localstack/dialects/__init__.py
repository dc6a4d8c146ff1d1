"""The three protocols that local servers speak, as far as starting one needs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from localstack.dialects.azure import Azure
from localstack.dialects.gcs import GCS
from localstack.dialects.s3 import S3
from localstack.recipe import Dialect


class Client(Protocol):
    """A client of one endpoint, just able to see whether it works."""

    def env(self) -> dict[str, str]:
        """The environment variables that lead other clients to the same endpoint."""

    def create_bucket(self, bucket: str) -> None:
        """Creates a bucket (Azure: a container) unless it is there."""

    def check(self) -> None:
        """Returns when a request is answered as it should be, raises otherwise."""


def client(dialect: Dialect, endpoint_url: str, secret: str) -> Client:
    """The client for `dialect`."""
    clients: Mapping[Dialect, Callable[[str, str], Client]] = {"s3": S3, "gcs": GCS, "azure": Azure}
    return clients[dialect](endpoint_url, secret)
