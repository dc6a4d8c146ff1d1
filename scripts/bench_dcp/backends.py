"""What is compared: each backend gives DCP a writer and a reader for a URL, set up as its own documentation advises."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

THREADS = 4
"""What users of DCP's file-system writers give them; more does not help on few cores."""


def ckpt_cloud(url: str) -> tuple[Any, Any]:
    """This library with its defaults."""
    from ckpt_cloud import ObjectStoreReader, ObjectStoreWriter

    return ObjectStoreWriter(url), ObjectStoreReader(url)


def ckpt_cloud_fsspec(url: str) -> tuple[Any, Any]:
    """This library with its fsspec engine."""
    from ckpt_cloud import ObjectStoreReader, ObjectStoreWriter

    return ObjectStoreWriter(url, engine="fsspec"), ObjectStoreReader(url, engine="fsspec")


def fsspec(url: str) -> tuple[Any, Any]:
    """DCP's own fsspec backend over s3fs."""
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter

    options = {"endpoint_url": os.environ["AWS_ENDPOINT_URL"]}
    return FsspecWriter(url, thread_count=THREADS, **options), FsspecReader(url, **options)


def s3torchconnector(url: str) -> tuple[Any, Any]:
    """Amazon's connector, with its reader made for DCP (its default)."""
    from s3torchconnector import S3ClientConfig
    from s3torchconnector.dcp import S3StorageReader, S3StorageWriter

    os.environ.setdefault("AWS_ENDPOINT_URL_S3", os.environ["AWS_ENDPOINT_URL"])
    region, config = os.environ["AWS_REGION"], S3ClientConfig(force_path_style=True)
    writer = S3StorageWriter(region, url, s3client_config=config, thread_count=THREADS)
    return writer, S3StorageReader(region, url, s3client_config=config)


def multi_storage_client(url: str) -> tuple[Any, Any]:
    """NVIDIA's client, with its reader that fetches whole files beforehand."""
    bucket, _, path = url.removeprefix("s3://").partition("/")
    options = {
        "base_path": bucket,
        "endpoint_url": os.environ["AWS_ENDPOINT_URL"],
        "region_name": os.environ["AWS_REGION"],
    }
    config = {"profiles": {"bench": {"storage_provider": {"type": "s3", "options": options}}}}
    with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as file:
        json.dump(config, file)
    os.environ["MSC_CONFIG"] = file.name
    try:
        from multistorageclient.contrib.torch import MultiStorageFileSystemReader, MultiStorageFileSystemWriter

        place = f"msc://bench/{path}"
        # Its streams have no file descriptor to sync.
        writer = MultiStorageFileSystemWriter(place, thread_count=THREADS, sync_files=False)
        reader = MultiStorageFileSystemReader(place, thread_count=THREADS)
        return writer, reader
    finally:
        Path(file.name).unlink()


OURS = "ckpt_cloud"
BACKENDS: dict[str, Callable[[str], tuple[Any, Any]]] = {
    OURS: ckpt_cloud,
    "ckpt_cloud_fsspec": ckpt_cloud_fsspec,
    "s3torchconnector": s3torchconnector,
    "multi_storage_client": multi_storage_client,
    "fsspec": fsspec,
}
"""All that can be compared, by name."""
PEERS = ("s3torchconnector", "multi_storage_client", "fsspec")


def calls(backend: str) -> Any:
    """The module whose `save`, `load` and `async_save` a user of `backend` calls."""
    if backend.startswith(OURS):
        import ckpt_cloud

        return ckpt_cloud
    from torch.distributed import checkpoint

    return checkpoint
