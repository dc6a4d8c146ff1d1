"""Every store operation of a save, an overwrite, a delete and a collection fails, is lost, hangs or is the last one.

Each time all that must hold is looked at: what is visible is whole, what was acknowledged is there, the other
checkpoint is untouched, and once the collector ran nothing is left that no checkpoint needs.
"""

import threading
from datetime import timedelta

import pytest

import ckpt_cloud
from ckpt_cloud.errors import CheckpointDeleted, CheckpointNotFound, CkptCloudError, CommitStateUnknown
from ckpt_cloud.testing import Faults

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
]

NOW = timedelta(0)


def collect(run, **how):
    return ckpt_cloud.gc(run.root, older_than=NOW, **how)


SCENARIOS = {
    "save": (lambda run: run.save("other", 1), lambda run: run.save("it", 2)),
    "overwrite": (
        lambda run: (run.save("other", 1), run.save("it", 5)),
        lambda run: run.save("it", 2, overwrite=True),
    ),
    "save-over-a-tombstone": (
        lambda run: (run.save("other", 1), run.save("it", 5), ckpt_cloud.delete(run.url("it"))),
        lambda run: run.save("it", 2),
    ),
    "delete": (
        lambda run: (run.save("other", 1), run.save("it", 5)),
        lambda run: ckpt_cloud.delete(run.url("it")),
    ),
    "collect": (
        lambda run: (
            run.save("other", 1),
            run.save("it", 4),
            run.save("it", 5, overwrite=True),
            run.put(f"dead/data/{'0' * 31}1/0.safetensors"),
            run.put(f"it/data/{'0' * 31}2/0.safetensors"),
            run.put(f"it/data/{'0' * 31}2/manifest"),
        ),
        collect,
    ),
}
BEFORE = {
    "save": CheckpointNotFound,
    "overwrite": 5,
    "save-over-a-tombstone": CheckpointDeleted,
    "delete": 5,
    "collect": 5,
}
AFTER = {"save": 2, "overwrite": 2, "save-over-a-tombstone": 2, "delete": CheckpointDeleted, "collect": 5}


def missing(outcome):
    return isinstance(outcome, type) and issubclass(outcome, CheckpointNotFound)


def same(outcome, expected):
    return missing(outcome) if missing(expected) else outcome == expected


def operations_of(new_run, scenario):
    prepare, act = SCENARIOS[scenario]
    run = new_run()
    prepare(run)
    faults = Faults()
    with faults.everywhere():
        act(run)
    return len(faults.operations)


KINDS = {
    "error": lambda faults, k: faults.fail("*", after=k, times=1),
    "lost-answer": lambda faults, k: faults.fail("*", after=k, times=1, applied=True),
    "gone-before": lambda faults, k: faults.crash_at(k + 1),
    "gone-after": lambda faults, k: (faults.fail("*", after=k, times=1, applied=True), faults.crash_at(k + 2)),
    "hang": lambda faults, k: faults.hang("*", after=k, times=1),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_operation(new_run, scenario, kind):
    prepare, act = SCENARIOS[scenario]
    count = operations_of(new_run, scenario)
    assert count >= 3
    for k in range(count):
        run = new_run()
        prepare(run)
        faults = Faults()
        KINDS[kind](faults, k)
        where = f"{scenario} {kind} at {k}"
        with faults.everywhere():
            error = hung(run, scenario, faults, k, where) if kind == "hang" else failure_of(act, run)
        faults.clear()
        if kind in ("error", "lost-answer") and scenario.startswith("save") and error is not None:
            unknown = isinstance(error, CommitStateUnknown)
            assert unknown or set(run.stored()) == run.needed(), f"{where}: it did not clean up after itself"
        check(run, scenario, error, where)


def failure_of(act, run):
    try:
        act(run)
    except CkptCloudError as error:
        return error
    return None


def hung(run, scenario, faults, k, where):
    """While it hangs, others look and a collector that spares nothing runs; then it goes on."""
    outcome = []
    thread = threading.Thread(target=lambda: outcome.append(failure_of(SCENARIOS[scenario][1], run)))
    thread.start()
    while len(faults.operations) <= k and thread.is_alive():
        thread.join(0.001)
    assert thread.is_alive(), f"{where}: nothing hangs"
    seen = run.load("it")
    assert same(seen, AFTER[scenario]) or same(seen, BEFORE[scenario]), where
    collect(run)
    assert same(run.load("it"), seen), f"{where}: the collector changed what is visible"
    faults.release()
    thread.join()
    assert outcome, f"{where}: it ended otherwise than with a typed error"
    return outcome[0]


def check(run, scenario, error, where):
    seen = run.load("it")
    assert same(seen, AFTER[scenario]) or same(seen, BEFORE[scenario]), where
    if error is None:
        assert same(seen, AFTER[scenario]), f"{where}: acknowledged"
    assert run.load("other") == 1, where

    told = collect(run, dry_run=True)
    assert run.load("it") == seen, where
    collected = collect(run)
    assert {each.key for each in told.objects} == {each.key for each in collected.objects}, where
    assert collected.skipped == [], where
    assert same(run.load("it"), seen), f"{where}: the collector changed what is visible"
    assert run.load("other") == 1, where
    assert set(run.stored()) == run.needed(), f"{where}: something is left"
    assert collect(run).objects == [], f"{where}: a second run finds nothing"

    run.save("it", 9, overwrite=True)
    assert run.load("it") == 9, where
    if scenario == "delete":
        ckpt_cloud.delete(run.url("it"))
        assert missing(run.load("it")), where
