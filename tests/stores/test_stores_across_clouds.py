"""A checkpoint that DCP saved on one cloud's dialect is loaded, bit for bit, from each of the three."""

import secrets

import pytest
import torch
from torch.distributed import checkpoint as dcp

from ckpt_cloud import ObjectStoreReader, ObjectStoreWriter, StoreOptions, bridge
from ckpt_cloud.stores import open_store, parse_url

pytestmark = [
    pytest.mark.timeout(90),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
]

ENGINES = {"s3": ("native", "fsspec"), "gs": ("fsspec",), "az": ("native", "fsspec")}


def state(seed):
    generator = torch.Generator().manual_seed(seed)
    weights = {f"w{number}": torch.randn(1 << 18, generator=generator) for number in range(3)}
    return {**weights, "odd": torch.randn(1001, generator=generator).bfloat16(), "step": seed}


@pytest.fixture
def urls(seaweedfs, fake_gcs, azurite, monkeypatch, nobodys_cloud):
    """One on each server, all at once, by the variables that `python -m localstack up s3 gcs azure` prints."""
    bucket = f"bucket-{secrets.token_hex(4)}"
    for server in (seaweedfs, fake_gcs, azurite):
        server.create_bucket(bucket)
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
    return {scheme: f"{scheme}://{bucket}/run/step-1" for scheme in ENGINES}


def copy(here, there):
    """As any tool copies it, with the register last."""
    source, target = (open_store(parse_url(url), StoreOptions()) for url in (here, there))

    async def copying():
        for key in sorted([info.key async for info in source.list()], key=lambda key: key == "COMMIT"):
            data, _ = await source.get(key, limit=1 << 30)
            await target.put(key, data)

    bridge.run(copying())


@pytest.mark.parametrize("home", ENGINES)
def test_saved_on_one_and_loaded_from_each(urls, home):
    dcp.save(state(7), storage_writer=ObjectStoreWriter(urls[home]))
    for scheme, url in urls.items():
        if scheme != home:
            copy(urls[home], url)
        for engine in ENGINES[scheme]:
            loaded = state(8)
            dcp.load(loaded, storage_reader=ObjectStoreReader(url, engine=engine))
            assert loaded["step"] == 7
            assert all(torch.equal(loaded[name], value) for name, value in state(7).items() if name != "step")
