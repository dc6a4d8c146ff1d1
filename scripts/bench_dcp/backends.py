"""What is compared: each backend gives DCP a writer and a reader for a URL."""

from __future__ import annotations

import os
from typing import Any


def ckpt_cloud(url: str) -> tuple[Any, Any]:
    """This library with its defaults."""
    from ckpt_cloud import ObjectStoreReader, ObjectStoreWriter

    return ObjectStoreWriter(url), ObjectStoreReader(url)


def ckpt_cloud_fsspec(url: str) -> tuple[Any, Any]:
    """This library with its fsspec engine."""
    from ckpt_cloud import ObjectStoreReader, ObjectStoreWriter

    return ObjectStoreWriter(url, engine="fsspec"), ObjectStoreReader(url, engine="fsspec")


def fsspec(url: str) -> tuple[Any, Any]:
    """DCP's own fsspec backend over s3fs, gcsfs or adlfs, with the four threads that its users give it."""
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter

    options = {"endpoint_url": os.environ["AWS_ENDPOINT_URL"]} if "AWS_ENDPOINT_URL" in os.environ else {}
    return FsspecWriter(url, thread_count=4, **options), FsspecReader(url, **options)


BACKENDS = {"ckpt_cloud": ckpt_cloud, "ckpt_cloud_fsspec": ckpt_cloud_fsspec, "fsspec": fsspec}
