"""Google Cloud Storage, as JSON over HTTP without credentials."""

from __future__ import annotations

import json
import secrets
from urllib.request import Request

from localstack.dialects.http import Refused, call

PROJECT = "localstack"


class GCS:
    """One GCS endpoint; an emulator checks no credentials, so `secret` goes unused."""

    def __init__(self, endpoint_url: str, secret: str) -> None:
        del secret
        self._url = endpoint_url

    def env(self) -> dict[str, str]:
        """What gcsfs, google-cloud-storage and ckpt_cloud read."""
        return {"STORAGE_EMULATOR_HOST": self._url, "GOOGLE_CLOUD_PROJECT": PROJECT}

    def create_bucket(self, bucket: str) -> None:
        try:
            self._call("POST", f"/storage/v1/b?project={PROJECT}", json.dumps({"name": bucket}).encode())
        except Refused as refused:
            if refused.status != 409:
                raise

    def check(self) -> None:
        """Writes an object, reads it back and leaves no trace."""
        bucket, data = f"localstack-{secrets.token_hex(6)}", b"ready?"
        self.create_bucket(bucket)
        self._call("POST", f"/upload/storage/v1/b/{bucket}/o?uploadType=media&name=ready", data)
        if self._call("GET", f"/storage/v1/b/{bucket}/o/ready?alt=media") != data:
            raise OSError(f"{self._url} returned other bytes than were stored")
        self._call("DELETE", f"/storage/v1/b/{bucket}/o/ready")
        self._call("DELETE", f"/storage/v1/b/{bucket}")

    def _call(self, method: str, path: str, body: bytes | None = None) -> bytes:
        return call(Request(self._url + path, body, {"Content-Type": "application/json"}, method=method))
