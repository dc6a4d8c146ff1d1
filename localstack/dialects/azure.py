"""Azure Blob Storage, as signed HTTP."""

from __future__ import annotations

import secrets
from collections.abc import Mapping

from localstack.dialects.http import Refused, call
from localstack.dialects.shared_key import ACCOUNT, KEY, signed


class Azure:
    """One endpoint with the emulators' account; its key is well known, so `secret` goes unused."""

    def __init__(self, endpoint_url: str, secret: str) -> None:
        del secret
        self._url = endpoint_url

    def env(self) -> dict[str, str]:
        """What adlfs, azure-storage-blob and ckpt_cloud read."""
        connection = {
            "DefaultEndpointsProtocol": "http",
            "AccountName": ACCOUNT,
            "AccountKey": KEY,
            "BlobEndpoint": self._url,
        }
        return {"AZURE_STORAGE_CONNECTION_STRING": ";".join(f"{name}={value}" for name, value in connection.items())}

    def create_bucket(self, bucket: str) -> None:
        try:
            self._call("PUT", f"{bucket}?restype=container", b"")
        except Refused as refused:
            if refused.status != 409:
                raise

    def check(self) -> None:
        """Writes a blob, reads it back and leaves no trace."""
        bucket, data = f"localstack-{secrets.token_hex(6)}", b"ready?"
        self.create_bucket(bucket)
        self._call("PUT", f"{bucket}/ready", data, {"x-ms-blob-type": "BlockBlob"})
        if self._call("GET", f"{bucket}/ready") != data:
            raise OSError(f"{self._url} returned other bytes than were stored")
        self._call("DELETE", f"{bucket}?restype=container")

    def _call(
        self, method: str, path: str, data: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> bytes:
        return call(signed(method, f"{self._url}/{path}", data, headers))
