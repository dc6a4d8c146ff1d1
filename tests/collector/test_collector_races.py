"""Two at once on one URL of a real server, from many seeds: savers, a saver and a collector, two collectors."""

import asyncio
import random
import secrets
import threading
from datetime import timedelta

import pytest

import ckpt_cloud
from ckpt_cloud import bridge
from ckpt_cloud.errors import AttemptAborted, CheckpointExists, CheckpointNotFound, CkptCloudError, StaleWrite
from ckpt_cloud.stores import open_store, parse_url
from tests.collector.conftest import Run

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
]

NOW = timedelta(0)
SEEDS = pytest.mark.parametrize("seeds", [8, pytest.param(100, marks=pytest.mark.slow)])


@pytest.fixture
def run(seaweedfs, monkeypatch, nobodys_cloud):
    for name, value in seaweedfs.env.items():
        monkeypatch.setenv(name, value)
    bucket = f"races-{secrets.token_hex(4)}"
    seaweedfs.create_bucket(bucket)
    run = Run(f"s3://{bucket}/run")
    run.save("other", 1)
    return run


def together(chance, *acts):
    """Runs all at nearly the same moment; what each returned, or its error."""
    outcomes = [None] * len(acts)
    barrier = threading.Barrier(len(acts))
    heads_start = [chance.uniform(0, 0.02) for _ in acts]

    def one(index):
        barrier.wait()
        threading.Event().wait(heads_start[index])
        try:
            outcomes[index] = acts[index]() or "done"
        except CkptCloudError as error:
            outcomes[index] = error

    threads = [threading.Thread(target=one, args=(index,)) for index in range(len(acts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def clean(run):
    ckpt_cloud.gc(run.root, older_than=NOW)
    assert set(run.stored()) == run.needed()
    assert ckpt_cloud.list_uploads(run.root) == []
    assert run.load("other") == 1


@SEEDS
@pytest.mark.parametrize("overwrite", [False, True], ids=["create", "replace"])
def test_two_jobs_save_to_one_url(run, overwrite, seeds):
    """One winner at most among creates; with overwrite each winner replaced exactly what it saw."""
    for seed in range(seeds):
        chance, name = random.Random(seed), f"it-{seed}"
        if overwrite:
            run.save(name, 5)
        values = (10, 20)
        outcomes = together(
            chance, *(lambda name=name, value=value: run.save(name, value, overwrite=overwrite) for value in values)
        )
        winners = [value for value, outcome in zip(values, outcomes, strict=True) if outcome == "done"]
        losers = [outcome for outcome in outcomes if outcome != "done"]
        assert winners
        assert all(type(error) is (StaleWrite if overwrite else CheckpointExists) for error in losers), seed
        assert overwrite or len(winners) == 1, seed
        assert run.load(name) in winners, seed
        left = {key.split("/")[2] for key in run.stored() if key.startswith(f"{name}/data/")}
        assert len(left) == len(winners) + overwrite, "a loser cleans up after itself"
    clean(run)


@SEEDS
def test_a_collector_that_spares_nothing_meets_a_commit(run, seeds):
    """Exactly one of them has its way; the data is there if and only if the save is committed."""
    for seed in range(seeds):
        name = f"it-{seed}"
        saved, _ = together(
            random.Random(seed), lambda name=name: run.save(name, 7), lambda: ckpt_cloud.gc(run.root, older_than=NOW)
        )
        if saved == "done":
            assert run.load(name) == 7, seed
        else:
            assert type(saved) is AttemptAborted, saved
            assert issubclass(run.load(name), CheckpointNotFound), seed
    clean(run)


def test_two_collectors_and_more_than_a_page(run):
    """1,100 objects of dead saves: more than one page of a listing, and more than one bulk delete."""
    run.save("it", 1)
    for number in range(11):
        store = open_store(parse_url(f"{run.root}/dead"), ckpt_cloud.StoreOptions())
        bridge.run(filled(store, f"data/{number:032x}"))
    outcomes = together(random.Random(0), *[lambda: ckpt_cloud.gc(run.root, older_than=NOW)] * 2)
    assert [len(outcome.objects) for outcome in outcomes if not isinstance(outcome, CkptCloudError)]
    clean(run)
    assert run.load("it") == 1


async def filled(store, prefix):
    await asyncio.gather(*(store.put(f"{prefix}/{number}.safetensors", b"x") for number in range(100)))
