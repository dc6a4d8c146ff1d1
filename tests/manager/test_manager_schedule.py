"""When to save: what policies say, alone and together, and that all ranks hear the same."""

import os
import signal
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_cloud import AnySave, LastN, SaveEveryNSteps, SaveEveryT, SaveOnPreemption, SavePolicy, SaveSteps
from ckpt_cloud.errors import InvalidOption
from ckpt_cloud.manager.preemption import Preemption
from ckpt_cloud.manager.ranks import Ranks
from ckpt_cloud.manager.save_policies import Moment
from ckpt_cloud.manager.schedule import Schedule

MINUTE = timedelta(minutes=1)


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def sigterm():
    noted = Preemption(60, lambda: None)
    yield noted
    noted.restore()


def saved_of(schedule, steps):
    """Asks for each, and saves what is due."""
    saved = []
    for step in steps:
        if schedule.due(step):
            schedule.saving(step)
            saved.append(step)
    return saved


@pytest.mark.parametrize(
    ("policy", "moment", "due"),
    [
        (SaveEveryNSteps(10), Moment(20), True),
        (SaveEveryNSteps(10), Moment(21), False),
        (SaveEveryNSteps(10), Moment(21, asked=19), True),
        (SaveEveryNSteps(10), Moment(29, asked=21), False),
        (SaveEveryT(MINUTE), Moment(1, since_save_s=59), False),
        (SaveEveryT(MINUTE), Moment(1, since_save_s=60), True),
        (SaveSteps([3, 5]), Moment(5), True),
        (SaveSteps([3, 5]), Moment(4), False),
        (SaveOnPreemption(), Moment(4), False),
        (SaveOnPreemption(), Moment(4, preempted=True), True),
        (SaveSteps([3]) | SaveEveryNSteps(10) | SaveOnPreemption(), Moment(30), True),
        (SaveSteps([3]) | SaveEveryNSteps(10) | SaveOnPreemption(), Moment(31), False),
        (AnySave(()), Moment(0), False),
        (SavePolicy(), Moment(0), False),
    ],
    ids=lambda value: type(value).__name__ if type(value) is SavePolicy else repr(value),
)
def test_what_is_due(policy, moment, due):
    assert policy.due(moment) is due


@given(st.integers(1, 50), st.lists(st.integers(1, 30), min_size=1, max_size=60), st.integers(0, 500))
def test_no_multiple_is_missed_however_the_count_jumps(n, jumps, begun):
    """Each interval that the count enters has one save, at the first step that reaches it."""
    schedule = Schedule(SaveEveryNSteps(n), Ranks(), None)
    schedule.restored(begun)
    steps = [begun + sum(jumps[: count + 1]) for count in range(len(jumps))]
    saved = saved_of(schedule, steps)
    entered = {step // n for step in steps} - {begun // n}
    assert [step // n for step in saved] == sorted(entered)
    assert all(step == min(each for each in steps if each // n == step // n) for step in saved)


def test_time_counts_from_the_last_save(clock):
    schedule = Schedule(SaveEveryT(MINUTE), Ranks(), None, clock)
    asked = []
    for step in range(1, 7):
        clock.now += 25
        asked += [step] if schedule.due(step) else []
        if asked[-1:] == [step]:
            schedule.saving(step)
    assert asked == [3, 6]
    clock.now += 50
    schedule.restored(2)
    clock.now += 50
    assert not schedule.due(3), "what was restored is as good as saved"


def test_a_step_is_saved_once():
    schedule = Schedule(SaveEveryNSteps(5), Ranks(), None)
    schedule.restored(10)
    assert saved_of(schedule, [10, 11, 15, 15]) == [15]


def test_a_signal_is_answered_once(sigterm):
    schedule = Schedule(SaveOnPreemption() | SaveEveryNSteps(10), Ranks(), sigterm)
    assert saved_of(schedule, [1, 2]) == []
    os.kill(os.getpid(), signal.SIGTERM)
    assert saved_of(schedule, [3, 4, 5, 10, 11]) == [3, 10]


def test_only_clocks_and_signals_make_ranks_talk():
    assert not (SaveEveryNSteps(5) | SaveSteps([1])).asks_ranks
    assert (SaveEveryNSteps(5) | SaveEveryT(MINUTE)).asks_ranks
    assert (SaveSteps([1]) | (SaveEveryNSteps(2) | SaveOnPreemption())).asks_ranks


@pytest.mark.parametrize(
    "options",
    [
        {"save_when": 500},
        {"save_when": LastN(3)},
        {"save_when": SaveEveryNSteps(5) | SaveOnPreemption()},
        {"keep": 3},
        {"keep": SaveSteps([1])},
    ],
    ids=repr,
)
def test_what_would_fail_later_is_refused_at_once(manage, options):
    with pytest.raises(InvalidOption):
        manage(**options)


@pytest.mark.parametrize(
    ("policy", "args"), [(SaveEveryNSteps, (0,)), (SaveEveryNSteps, (2.5,)), (SaveEveryT, (timedelta(0),))]
)
def test_policies_refuse_nonsense(policy, args):
    with pytest.raises(InvalidOption):
        policy(*args)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_a_manager_asks_it(manage, made):
    with manage(save_when=SaveEveryNSteps(2) | SaveSteps([1])) as manager:
        for step in range(1, 6):
            if manager.should_save(step):
                manager.save(step, made(step))
        assert manager.all_steps() == [1, 2, 4]
    with pytest.raises(InvalidOption, match="closed"):
        manager.should_save(6)
    with manage(save_when=SaveEveryNSteps(2)) as manager:
        assert manager.restore(made(0)) == 4
        assert [manager.should_save(step) for step in (4, 5, 6)] == [False, False, True]


def test_without_a_policy_nobody_can_tell(manage):
    with pytest.raises(InvalidOption, match="nothing says when to save"):
        manage().should_save(1)
