"""A checkpoint that was saved to one cloud, copied object by object, loads from every other."""

import pytest
import torch
from torch.distributed import checkpoint as dcp

from ckpt_cloud import ObjectStoreReader, ObjectStoreWriter, bridge
from ckpt_cloud.options import StoreOptions, TransferOptions
from ckpt_cloud.stores import open_store, parse_url


def state(seed):
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"w{n}": torch.randn(700, 1000, generator=generator).to(torch.bfloat16) for n in range(12)}
    return {"model": tensors, "step": seed, "note": "x" * 100_000}


def copied(source, target):
    """Every object as it is; what `aws s3 sync`, `gcloud storage cp` or `azcopy` do."""

    async def copy():
        here, there = (open_store(parse_url(url), StoreOptions()) for url in (source, target))
        keys = [info.key async for info in here.list()]
        for key in keys:
            data, _ = await here.get(key, limit=1 << 30)
            await there.put(key, data)
        return keys

    return bridge.run(copy())


@pytest.mark.parametrize("origin", ["s3", "azure", "gcs"])
def test_saved_on_one_cloud_and_loaded_from_all(origin, cloud_root):
    roots = {cloud: f"{cloud_root(cloud)}/run/step-1" for cloud in ("s3", "azure", "gcs")}
    saved = state(7)
    dcp.save(saved, storage_writer=ObjectStoreWriter(roots[origin], transfer=TransferOptions(part_size=5 << 20)))
    for cloud, url in roots.items():
        if cloud != origin:
            assert len(copied(roots[origin], url)) >= 3
        loaded = state(8)
        dcp.load(loaded, storage_reader=ObjectStoreReader(url))
        assert loaded["step"] == 7
        assert loaded["note"] == saved["note"]
        assert all(torch.equal(loaded["model"][name], value) for name, value in saved["model"].items())


@pytest.mark.parametrize(
    ("cloud", "written_by", "read_by"),
    [
        ("s3", "native", "fsspec"),
        ("s3", "fsspec", "native"),
        ("azure", "native", "fsspec"),
        ("azure", "fsspec", "native"),
    ],
)
def test_saved_with_one_engine_and_loaded_with_the_other(cloud, written_by, read_by, cloud_root):
    url = f"{cloud_root(cloud)}/run/step-1"
    saved = state(7)
    dcp.save(saved, storage_writer=ObjectStoreWriter(url, engine=written_by))
    dcp.save(saved, storage_writer=ObjectStoreWriter(url, engine=read_by, overwrite=True))
    loaded = state(8)
    dcp.load(loaded, storage_reader=ObjectStoreReader(url, engine=read_by))
    assert all(torch.equal(loaded["model"][name], value) for name, value in saved["model"].items())
