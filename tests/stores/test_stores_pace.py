"""Fewer requests in flight when the store throttles, more again as it answers; nobody waits for ever."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_cloud.errors import Throttled
from ckpt_cloud.stores.pace import Pace

pytestmark = pytest.mark.timeout(30)


async def turns(pace, count):
    return [await pace.enter() for _ in range(count)]


async def test_there_is_no_limit_until_the_store_throttles():
    pace = Pace()
    await turns(pace, 500)
    assert (pace.limit, pace.in_flight) == (None, 500)


async def test_half_of_what_was_in_flight_is_the_limit():
    pace = Pace()
    given = await turns(pace, 16)
    pace.throttled(given[3])
    assert pace.limit == 8
    for _ in range(8):
        pace.leave()
    waiting = asyncio.ensure_future(pace.enter())
    await asyncio.sleep(0)
    assert not waiting.done()
    pace.leave()
    await waiting
    assert pace.in_flight == 8


async def test_requests_that_flew_together_count_as_one_refusal():
    pace = Pace()
    given = await turns(pace, 16)
    for one in given:
        pace.throttled(one)
    assert pace.limit == 8
    for _ in given:
        pace.leave()
    pace.throttled((await turns(pace, 8))[-1])
    assert pace.limit == 4


async def test_there_is_always_one():
    pace = Pace()
    for _ in range(5):
        (only,) = await turns(pace, 1)
        pace.throttled(only)
        pace.leave()
    assert pace.limit == 1
    await asyncio.wait_for(pace.enter(), 5)


async def test_each_round_of_answers_allows_one_more():
    pace = Pace()
    given = await turns(pace, 8)
    pace.throttled(given[0])
    assert pace.limit == 4
    for expected in (5, 6, 7):
        for _ in range(pace.limit):
            pace.answered()
        assert pace.limit == expected


async def test_a_turn_ends_however_its_request_does():
    pace = Pace()
    with pytest.raises(Throttled):
        async with pace.turn():
            raise Throttled("slow down")
    with pytest.raises(KeyError):
        async with pace.turn():
            raise KeyError("x")
    async with pace.turn():
        assert pace.in_flight == 1
    assert pace.in_flight == 0
    assert "0 in flight of 2" in repr(pace)


async def test_a_turn_given_to_a_waiter_that_was_cancelled_goes_on():
    pace = Pace()
    pace.throttled((await turns(pace, 2))[0])
    pace.leave()
    first, second = asyncio.ensure_future(pace.enter()), asyncio.ensure_future(pace.enter())
    await asyncio.sleep(0)
    pace.leave()
    first.cancel()
    await asyncio.wait_for(second, 5)
    assert first.cancelled()
    assert pace.in_flight == 1


@given(st.lists(st.tuples(st.integers(1, 4), st.booleans()), min_size=1, max_size=40), st.integers(1, 12))
def test_the_limit_holds_and_everyone_has_a_turn(requests, lanes):
    """Whatever is refused when, no more fly than may, and all end."""

    async def run():
        pace = Pace()
        queue = iter(requests)
        served = 0

        async def lane():
            nonlocal served
            for rounds, refused in queue:
                mine = await pace.enter()
                # A turn is only given below the limit; one that shrinks later takes none back.
                assert pace.limit is None or pace.in_flight <= max(pace.limit, lanes)
                for _ in range(rounds):
                    await asyncio.sleep(0)
                pace.throttled(mine) if refused else pace.answered()
                pace.leave()
                served += 1

        await asyncio.wait_for(asyncio.gather(*(lane() for _ in range(lanes))), 20)
        assert served == len(requests)
        assert pace.in_flight == 0

    asyncio.run(run())
