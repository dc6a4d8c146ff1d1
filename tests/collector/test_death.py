"""Ranks, the coordinator, all of them and the server die by `kill -9` at random moments of a save, from a seed.

After each death: what is visible is whole, what any rank was told is true, survivors end with a typed error within a
deadline, the other checkpoint is untouched, and the collector leaves nothing.
"""

import multiprocessing
import os
import random
import secrets
import signal
import sys
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path

import pytest

import ckpt_cloud
from tests.collector.conftest import Run

sys.path.insert(0, str(Path(__file__).parent))

import dying

pytestmark = [
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
]

DEADLINE_S = 60
"""For ranks to come up, and for survivors to end."""


@pytest.fixture(scope="module")
def context():
    """Children of a server that has imported torch once, and used nothing."""
    context = multiprocessing.get_context("forkserver")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), str(Path.cwd())])
    os.environ["OMP_NUM_THREADS"] = "1"
    context.set_forkserver_preload(["dying"])
    return context


@pytest.fixture
def run(seaweedfs, monkeypatch, nobodys_cloud):
    for name, value in seaweedfs.env.items():
        monkeypatch.setenv(name, value)
    bucket = f"death-{secrets.token_hex(4)}"
    seaweedfs.create_bucket(bucket)
    return Run(f"s3://{bucket}/run")


def attempt(context, run, tmp_path, value, *, overwrite, kill):
    """One save; `kill(processes)` is called once all ranks begin. How each rank ended, None for the dead."""
    meeting = tmp_path / secrets.token_hex(4)
    meeting.mkdir()
    ready = context.Barrier(dying.WORLD + 1)
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    ranks = [
        context.Process(
            target=dying.run,
            args=(environment, rank, str(meeting), run.url("it"), value, overwrite, ready),
            daemon=True,
        )
        for rank in range(dying.WORLD)
    ]
    for rank in ranks:
        rank.start()
    ready.wait(DEADLINE_S)
    kill(ranks)
    until = time.monotonic() + DEADLINE_S
    for rank in ranks:
        rank.join(max(0, until - time.monotonic()))
        assert rank.exitcode is not None, "a rank hangs"
    files = [meeting / f"{rank}.txt" for rank in range(dying.WORLD)]
    return [file.read_text() if file.exists() else None for file in files]


def loaded(run):
    """The value of `it`, whole; None where nothing is."""
    state = dying.state(-1, range(dying.WORLD))
    try:
        ckpt_cloud.load(state, checkpoint_id=run.url("it"))
    except ckpt_cloud.errors.CheckpointNotFound:
        return None
    value = state["step"]
    assert all(tensor.eq(value).all() for name, tensor in state.items() if name != "step")
    return value


def check(run, outcomes, value, before):
    assert not [told for told in outcomes if told and told.startswith("untyped")], outcomes
    seen = loaded(run)
    assert seen in (value, before), outcomes
    if "saved" in outcomes:
        assert seen == value, "a rank was told that it is saved"
    ckpt_cloud.gc(run.root, older_than=timedelta(0))
    assert loaded(run) == seen
    assert run.load("other") == 1
    assert set(run.stored()) == run.needed()
    assert ckpt_cloud.list_uploads(run.root) == []
    return seen


VICTIMS = {
    "coordinator": lambda _chance: [0],
    "rank": lambda chance: [chance.randrange(1, dying.WORLD)],
    "two": lambda chance: chance.sample(range(dying.WORLD), 2),
    "all": lambda _chance: list(range(dying.WORLD)),
    "server": lambda _chance: [],
}


def death(name, victims, moment_s, server):
    """Waits for the moment, then kills."""

    def kill(ranks):
        ranks[0].join(moment_s)
        if name == "server":
            server.kill()
            server.restart()
        for victim in victims:
            if ranks[victim].exitcode is None:
                os.kill(ranks[victim].pid, signal.SIGKILL)

    return kill


@pytest.mark.parametrize("trials", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_something_dies_at_a_random_moment(context, run, tmp_path, seaweedfs, trials):
    """The seed says who dies and when, as a part of the time that an undisturbed save takes."""
    chance = random.Random(20261123)
    run.save("other", 1)
    began = []
    outcomes = attempt(context, run, tmp_path, 1, overwrite=False, kill=lambda _ranks: began.append(time.monotonic()))
    whole_s = time.monotonic() - began[0]
    assert outcomes == ["saved"] * dying.WORLD
    before, met = 1, Counter()
    for number in range(trials):
        name = list(VICTIMS)[number % len(VICTIMS)]
        kill = death(name, VICTIMS[name](chance), chance.uniform(0, whole_s), seaweedfs)
        outcomes = attempt(context, run, tmp_path, number + 10, overwrite=True, kill=kill)
        met.update(f"{name}: {told or 'died'}" for told in outcomes)
        before = check(run, outcomes, number + 10, before)
    print(f"a whole save took {whole_s:.1f} s; {dict(sorted(met.items()))}")
    assert any(key.endswith("died") for key in met)
    if trials == 100:
        assert {"saved", "RankLost"} <= {key.partition(": ")[2] for key in met}, "some came through, some lost others"
