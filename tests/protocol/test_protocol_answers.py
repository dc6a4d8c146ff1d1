"""COMMIT.md's table of ambiguous answers, row by row: intent, what was seen, answer, read-back → conclusion."""

import pytest
from msgspec import structs

from ckpt_cloud.errors import AttemptAborted, CheckpointExists, CommitStateUnknown, StaleWrite
from ckpt_cloud.format.layout import NO_ID
from ckpt_cloud.format.register import ManifestRef, Register, Signature
from ckpt_cloud.protocol import (
    Answer,
    Committed,
    Failed,
    Intent,
    Put,
    ReadBack,
    Seen,
    admit,
    after_put,
    after_read_back,
    deleted,
    fenced_off,
    first_step,
    out_of_time,
)

URL = "s3://bucket/run/step-1"
APPLIED, REFUSED, UNCLEAR = Answer.APPLIED, Answer.REFUSED, Answer.UNCLEAR


def id_(number):
    return f"{number:032x}"


def committed(number, fence=NO_ID):
    return Register("committed", id_(number), fence, ManifestRef(f"data/{id_(number)}/manifest", 1, "0" * 64))


def tombstone(state, fence):
    return Register(state, id_(99), id_(fence))


OURS = 10
NOTHING = Seen(None)
CREATE = Intent(committed(OURS), id_(OURS), overwrite=False)
REPLACE = Intent(committed(OURS), id_(OURS), overwrite=True)
BEFORE = Seen(committed(5), "v5")
DELETED = Seen(tombstone("deleted", 9), "v9")
MINE = Seen(committed(OURS), "mine")
THEIRS = Seen(committed(7), "theirs")


def conclusion(intent, seen, answer, read_back):
    """What one conditional put and, where it is asked for, one read-back lead to."""
    step = first_step(intent, seen, URL)
    if not isinstance(step, Put):
        return step
    sent = step
    step = after_put(answer)
    return after_read_back(intent, sent, read_back, URL) if isinstance(step, ReadBack) else step


@pytest.mark.parametrize(
    ("intent", "seen", "answer", "read_back"),
    [
        pytest.param(CREATE, NOTHING, APPLIED, None, id="A1-create"),
        pytest.param(REPLACE, BEFORE, APPLIED, None, id="A1-replace"),
        pytest.param(CREATE, DELETED, APPLIED, None, id="A1-over-a-tombstone"),
        pytest.param(CREATE, NOTHING, REFUSED, MINE, id="A3-own-lost-ack"),
        pytest.param(REPLACE, BEFORE, REFUSED, MINE, id="A3-own-lost-ack-of-a-replace"),
        pytest.param(CREATE, NOTHING, UNCLEAR, MINE, id="A5-it-landed"),
        pytest.param(REPLACE, BEFORE, UNCLEAR, MINE, id="A6-it-landed"),
        pytest.param(
            CREATE,
            NOTHING,
            UNCLEAR,
            Seen(committed(OURS, fence=id_(OURS)), "later"),
            id="A5-it-landed-and-a-collector-raised-the-fence",
        ),
    ],
)
def test_committed(intent, seen, answer, read_back):
    assert conclusion(intent, seen, answer, read_back) == Committed()


@pytest.mark.parametrize(
    ("intent", "seen", "answer", "read_back"),
    [
        pytest.param(CREATE, NOTHING, UNCLEAR, NOTHING, id="A4-A5-A6-it-may-land-yet"),
        pytest.param(REPLACE, BEFORE, UNCLEAR, BEFORE, id="A4-A5-A6-unchanged"),
        pytest.param(CREATE, DELETED, UNCLEAR, DELETED, id="A5-tombstone-unchanged"),
        pytest.param(CREATE, NOTHING, REFUSED, NOTHING, id="A2-refused-for-what-is-gone"),
        pytest.param(REPLACE, BEFORE, REFUSED, BEFORE, id="A2-refused-and-unchanged"),
    ],
)
def test_the_same_put_is_sent_again(intent, seen, answer, read_back):
    step = conclusion(intent, seen, answer, read_back)
    assert step == Put(seen.version, seen.register.fence if seen.register else NO_ID)
    assert step == first_step(intent, seen, URL)


RAISED = Intent(committed(OURS), id_(OURS), overwrite=True, base=id_(5))


@pytest.mark.parametrize("answer", [REFUSED, UNCLEAR])
@pytest.mark.parametrize(
    ("intent", "seen", "read_back"),
    [
        pytest.param(CREATE, NOTHING, Seen(tombstone("aborted", OURS), "v2"), id="where-nothing-was"),
        pytest.param(CREATE, DELETED, Seen(tombstone("deleted", OURS), "v2"), id="over-a-tombstone"),
        pytest.param(RAISED, BEFORE, Seen(committed(5, fence=id_(OURS)), "v2"), id="over-what-we-replace"),
        pytest.param(RAISED, BEFORE, Seen(tombstone("deleted", OURS), "v2"), id="what-we-replace-was-deleted"),
    ],
)
def test_a_collector_that_raised_the_fence_below_us_does_not_end_the_save(intent, seen, answer, read_back):
    assert conclusion(intent, seen, answer, read_back) == Put("v2", id_(OURS))


@pytest.mark.parametrize(
    ("intent", "seen", "answer", "read_back", "error"),
    [
        pytest.param(CREATE, NOTHING, REFUSED, THEIRS, CheckpointExists, id="A2-lost-race"),
        pytest.param(CREATE, NOTHING, UNCLEAR, THEIRS, CheckpointExists, id="A5-lost-race"),
        pytest.param(CREATE, NOTHING, REFUSED, Seen(committed(20), "v"), CheckpointExists, id="A11-newer-one-won"),
        pytest.param(REPLACE, BEFORE, REFUSED, THEIRS, StaleWrite, id="A2-replaced-by-another"),
        pytest.param(REPLACE, NOTHING, REFUSED, THEIRS, StaleWrite, id="A2-created-by-another"),
        pytest.param(REPLACE, BEFORE, REFUSED, NOTHING, StaleWrite, id="A10-gone"),
        pytest.param(CREATE, DELETED, REFUSED, NOTHING, StaleWrite, id="A10-tombstone-gone"),
        pytest.param(
            CREATE, NOTHING, REFUSED, Seen(tombstone("aborted", OURS + 1), "v"), AttemptAborted, id="A20-collected"
        ),
        pytest.param(
            REPLACE, BEFORE, UNCLEAR, Seen(tombstone("deleted", OURS + 1), "v"), AttemptAborted, id="A20-deleted"
        ),
        pytest.param(
            REPLACE, BEFORE, REFUSED, Seen(committed(5, fence=id_(OURS + 1)), "v"), AttemptAborted, id="A20-fenced-off"
        ),
        pytest.param(
            CREATE, NOTHING, REFUSED, Seen(committed(7, fence=id_(OURS + 1)), "v"), AttemptAborted, id="A20-both"
        ),
        pytest.param(CREATE, Seen(tombstone("aborted", OURS + 1), "v"), None, None, AttemptAborted, id="A20-known"),
        pytest.param(CREATE, BEFORE, None, None, CheckpointExists, id="exists"),
    ],
)
def test_failed(intent, seen, answer, read_back, error):
    step = conclusion(intent, seen, answer, read_back)
    assert isinstance(step, Failed)
    assert type(step.error) is error
    assert step.error.url == URL


def test_the_fence_is_held_against_the_oldest_id_and_may_equal_it():
    several_ranks = Intent(committed(OURS), id_(8), overwrite=True)
    assert isinstance(first_step(several_ranks, Seen(tombstone("aborted", 9), "v"), URL), Failed)
    assert first_step(several_ranks, Seen(tombstone("aborted", 8), "v"), URL) == Put("v", id_(8))
    assert isinstance(first_step(several_ranks, Seen(committed(5, fence=id_(9)), "v"), URL), Failed)


def test_no_fence_is_ever_lowered():
    high = Seen(committed(5, fence=id_(9)), "v")
    assert fenced_off(high, id_(7)) is None
    assert deleted(high, id_(7)).fence == id_(9)
    assert fenced_off(DELETED, id_(7)) is None
    assert deleted(DELETED, id_(7)) is None


def test_a_fence_is_all_that_a_collector_changes():
    register = structs.replace(committed(5), metrics={"loss": 1.0}, signature=Signature("ed25519", "", "00"))
    assert fenced_off(Seen(register, "v"), id_(7)) == structs.replace(register, fence=id_(7))


@pytest.mark.parametrize("seen", [NOTHING, BEFORE, DELETED], ids=["nothing", "committed", "deleted"])
@pytest.mark.parametrize("overwrite", [True, False])
def test_admission(seen, overwrite):
    refusal = admit(seen, overwrite=overwrite, url=URL)
    if seen is BEFORE and not overwrite:
        assert isinstance(refusal, CheckpointExists)
        assert "overwrite" in refusal.hint
    else:
        assert refusal is None


def test_out_of_time_names_the_attempt_and_that_nothing_was_deleted():
    error = out_of_time(CREATE, URL)
    assert type(error) is CommitStateUnknown
    assert id_(OURS) in str(error)
    assert "nothing was deleted" in error.hint


@pytest.mark.parametrize("answer", [REFUSED, UNCLEAR])
def test_only_a_clear_yes_is_believed(answer):
    assert after_put(answer) == ReadBack()
    assert after_put(APPLIED) == Committed()
