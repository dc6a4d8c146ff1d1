"""Retention policies: what they keep, alone and together, and what is never given up."""

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_cloud import AnyOf, BestN, EveryNSteps, EveryT, KeepAll, LastN, Listed, NewerThan, SavedStep
from ckpt_cloud.errors import InvalidOption
from ckpt_cloud.manager.policies import doomed, ranked

NOW = 1_000_000.0


def run(*steps, every_s=60, metrics=None):
    """Steps saved `every_s` apart, the last of them now."""
    return [
        SavedStep(step, NOW - every_s * (len(steps) - 1 - place), (metrics or {}).get(step, {}))
        for place, step in enumerate(steps)
    ]


LOSSES = {10: {"loss": 3.0}, 20: {"loss": 1.0}, 30: {"loss": 2.0}, 40: {}, 50: {"loss": 1.0}}


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        (KeepAll(), {10, 20, 30, 40, 50}),
        (LastN(2), {40, 50}),
        (LastN(9), {10, 20, 30, 40, 50}),
        (EveryNSteps(20), {20, 40}),
        (EveryT(timedelta(minutes=2)), {10, 30, 50}),
        (EveryT(timedelta(minutes=90)), {10}),
        (BestN(1, "loss"), {50}),
        (BestN(2, "loss"), {20, 50}),
        (BestN(1, "loss", "max"), {10}),
        (BestN(3, "accuracy"), set()),
        (Listed([10, 99]), {10}),
        (NewerThan(timedelta(seconds=90)), {40, 50}),
        (LastN(1) | Listed([10]), {10, 50}),
        (LastN(1) | EveryNSteps(20) | BestN(1, "loss", "max"), {10, 20, 40, 50}),
        (AnyOf(()), set()),
    ],
    ids=repr,
)
def test_what_is_kept(policy, kept):
    assert policy.keep(run(10, 20, 30, 40, 50, metrics=LOSSES), NOW) == kept


@pytest.mark.parametrize(
    ("policy", "args"),
    [
        (LastN, (0,)),
        (EveryNSteps, (-1,)),
        (BestN, (0, "loss")),
        (BestN, (1, "loss", "least")),
        (EveryT, (timedelta(0),)),
        (NewerThan, (timedelta(days=-1),)),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(policy, args):
    with pytest.raises(InvalidOption):
        policy(*args)


def test_of_equals_the_later_is_better():
    assert [each.step for each in ranked(run(10, 20, 30, 40, 50, metrics=LOSSES), "loss", "min")] == [50, 20, 30, 10]


def test_nothing_goes_without_a_good_checkpoint():
    assert doomed(LastN(1), run(1, 2, 3), newest_good=None, pinned=set(), now_unix_s=NOW) == []


def test_what_is_in_use_stays():
    found = doomed(LastN(1), run(1, 2, 3), newest_good=3, pinned={1}, now_unix_s=NOW)
    assert [each.step for each in found] == [2]


policies = st.one_of(
    st.builds(LastN, st.integers(1, 5)),
    st.builds(EveryNSteps, st.integers(1, 7)),
    st.builds(EveryT, st.timedeltas(timedelta(seconds=1), timedelta(hours=1))),
    st.builds(BestN, st.integers(1, 3), st.just("loss"), st.sampled_from(["min", "max"])),
    st.builds(Listed, st.lists(st.integers(0, 30))),
    st.builds(NewerThan, st.timedeltas(timedelta(seconds=1), timedelta(hours=1))),
)
runs = st.dictionaries(st.integers(0, 30), st.floats(0, 9), min_size=1).map(
    lambda losses: run(*sorted(losses), metrics={step: {"loss": loss} for step, loss in losses.items()})
)


@given(policies, policies, runs)
def test_the_newest_stays_and_a_second_run_finds_nothing(one, other, saved):
    newest = saved[-1].step
    gone = {each.step for each in doomed(one | other, saved, newest_good=newest, pinned=set(), now_unix_s=NOW)}
    assert newest not in gone
    assert not gone & (one.keep(saved, NOW) | other.keep(saved, NOW))
    left = [each for each in saved if each.step not in gone]
    assert doomed(one | other, left, newest_good=newest, pinned=set(), now_unix_s=NOW) == []
