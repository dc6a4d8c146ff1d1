"""Saves in the background, on ranks: threads and processes, stagers, groups, credentials."""

import calls
import pytest
import ranks
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.staging import BlockingAsyncStager, DefaultStager, StagingOptions

import ckpt_cloud
from ckpt_cloud import ObjectStoreWriter

# Pinned, shared, asynchronous, without blocking: the first and the last need an accelerator.
STAGERS = {"DCP's own": None, "shared": (False, True, False, False), "in a thread": (False, True, True, False)}


@pytest.mark.parametrize("kind", ["THREAD", "PROCESS"])
def test_saves_are_of_the_moment_they_were_staged(tmp_path, kind):
    assert ranks.run(2, calls.staged_saves, tmp_path, f"file://{tmp_path}/run", kind, STAGERS) == [[]] * 2


@pytest.mark.parametrize("kind", ["THREAD", "PROCESS"])
def test_a_failure_in_the_background_is_typed_and_the_next_save_works(tmp_path, kind):
    told = ranks.run(2, calls.failures_in_the_background, tmp_path, f"file://{tmp_path}/run", kind)
    assert told == [[("RankFailed", True), None, ("CheckpointExists", False), True]] * 2


def test_credentials_of_a_process_come_from_the_environment(tmp_path, monkeypatch, moto_server):
    """Those that were given as arguments do not travel with the writer."""
    moto_server.create_bucket("process-bucket")
    secrets = {"access_key_id": "AKIAMARKED", "secret_access_key": "MARKED", "endpoint_url": moto_server.endpoint_url}
    url = "s3://process-bucket/run/step-1"
    for kind, said in ranks.run(2, calls.save_in_a_process, tmp_path, url, secrets):
        assert kind == "MissingCredentials"
        assert "not pickled" in said
        assert "MARKED" not in said
    for name, value in moto_server.env.items():
        monkeypatch.setenv(name, value)
    assert ranks.run(2, calls.save_in_a_process, tmp_path, url, {}) == [None] * 2
    assert ckpt_cloud.latest("s3://process-bucket/run") == url


def test_groups_save_at_once(tmp_path):
    assert ranks.run(4, calls.groups_at_once, tmp_path, f"file://{tmp_path}/run") == [[]] * 4


def test_a_stager_that_exchanges_replicas(tmp_path):
    assert ranks.run(4, calls.replicas, tmp_path, str(tmp_path)) == [True] * 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs a GPU")
def test_from_a_gpu_through_pinned_memory(file_url):
    stager = DefaultStager(StagingOptions())
    try:
        for step in (1, 2):
            state = {"w": torch.full((2000, 1000), float(step), device="cuda"), "step": step}
            response = ckpt_cloud.async_save(state, checkpoint_id=f"{file_url}-{step}", async_stager=stager)
            response.staging_completion.result()
            state["w"].fill_(-1)
            response.upload_completion.result()
            got = {"w": torch.zeros(2000, 1000, device="cuda"), "step": 0}
            ckpt_cloud.load(got, checkpoint_id=f"{file_url}-{step}")
            assert got["w"].eq(step).all()
            assert got["step"] == step
    finally:
        stager.close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU makes it possible")
def test_pinned_staging_without_a_gpu(file_url):
    """DCP goes on without the pinning, and refuses copies that do not block."""
    with pytest.warns(UserWarning, match="Ignoring pin_memory"):
        stager = DefaultStager(StagingOptions(True, True, False, False))
    ckpt_cloud.async_save({"w": torch.ones(50)}, checkpoint_id=file_url, async_stager=stager).result()
    stager.close()
    got = {"w": torch.zeros(50)}
    ckpt_cloud.load(got, checkpoint_id=file_url)
    assert got["w"].eq(1).all()
    with pytest.raises(AssertionError, match="Non-blocking"):
        DefaultStager(StagingOptions(False, False, False, True))


def test_the_old_stager(file_url):
    state = {"w": torch.ones(50)}
    future = dcp.async_save(state, storage_writer=ObjectStoreWriter(file_url), async_stager=BlockingAsyncStager())
    state["w"].zero_()
    future.result()
    got = {"w": torch.zeros(50)}
    ckpt_cloud.load(got, checkpoint_id=file_url)
    assert got["w"].eq(1).all()
