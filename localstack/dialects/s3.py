"""S3, through boto3."""

from __future__ import annotations

import secrets
from functools import cached_property
from typing import Any

ACCESS_KEY = "localstack"
REGION = "us-east-1"


class S3:
    """One S3 endpoint."""

    def __init__(self, endpoint_url: str, secret: str) -> None:
        self._endpoint_url, self._secret = endpoint_url, secret

    def env(self) -> dict[str, str]:
        """What boto3, s3fs and ckpt_cloud read, and what obstore needs to accept plain HTTP."""
        return {
            "AWS_ENDPOINT_URL": self._endpoint_url,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": self._secret,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_ALLOW_HTTP": "true",
        }

    def create_bucket(self, bucket: str) -> None:
        try:
            self._client.create_bucket(Bucket=bucket)
        except (self._client.exceptions.BucketAlreadyOwnedByYou, self._client.exceptions.BucketAlreadyExists):
            pass

    def check(self) -> None:
        """Writes an object, reads it back and leaves no trace: a server that lists may not be able to store yet."""
        # A name of its own: a check that was cut short may have left its bucket behind.
        bucket, key, data = f"localstack-{secrets.token_hex(6)}", "ready", b"ready?"
        self._client.create_bucket(Bucket=bucket)
        try:
            self._client.put_object(Bucket=bucket, Key=key, Body=data)
            if self._client.get_object(Bucket=bucket, Key=key)["Body"].read() != data:
                raise OSError(f"{self._endpoint_url} returned other bytes than were stored")
            self._client.delete_object(Bucket=bucket, Key=key)
        finally:
            self._client.delete_bucket(Bucket=bucket)

    @cached_property
    def _client(self) -> Any:
        import boto3
        from botocore.config import Config

        return boto3.session.Session().client(
            "s3",
            endpoint_url=self._endpoint_url,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=self._secret,
            region_name=REGION,
            # No retries: whoever polls is the retry. Straight to this machine, whatever proxy is configured.
            config=Config(
                connect_timeout=2,
                read_timeout=5,
                retries={"total_max_attempts": 1},
                s3={"addressing_style": "path"},
                proxies={},
            ),
        )
