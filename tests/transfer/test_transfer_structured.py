"""Tasks that live and die together."""

import asyncio

import pytest

from ckpt_cloud.errors import StoreUnavailable
from ckpt_cloud.transfer.structured import all_or_cancel
from ckpt_cloud.workers import to_the_end

pytestmark = pytest.mark.timeout(30)


async def value(result, turns=0):
    for _ in range(turns):
        await asyncio.sleep(0)
    return result


async def test_results_come_in_order():
    assert await all_or_cancel(value(number, turns=5 - number) for number in range(5)) == [0, 1, 2, 3, 4]


async def test_nothing_to_do():
    assert await all_or_cancel([]) == []


async def test_the_first_failure_cancels_and_awaits_the_rest():
    cleaned_up = []

    async def rest(name):
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.01)
            cleaned_up.append(name)

    async def fails():
        await asyncio.sleep(0)
        raise StoreUnavailable("gone")

    with pytest.raises(StoreUnavailable, match="gone"):
        await all_or_cancel([rest("a"), fails(), rest("b")])
    assert sorted(cleaned_up) == ["a", "b"]
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_failure_within_a_failure_comes_bare():
    async def fails():
        raise StoreUnavailable("inner")

    with pytest.raises(StoreUnavailable, match="inner"):
        await all_or_cancel([all_or_cancel([fails()]), value(1, turns=99)])


async def test_cancelled_from_outside():
    ended = []

    async def waits():
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(1)

    whole = asyncio.create_task(all_or_cancel([waits(), waits()]))
    for _ in range(3):
        await asyncio.sleep(0)
    whole.cancel()
    with pytest.raises(asyncio.CancelledError):
        await whole
    assert ended == [1, 1]


async def test_to_the_end_is_not_cut_short():
    ended = []

    async def work():
        await asyncio.sleep(0.02)
        ended.append(1)
        raise StoreUnavailable("heard by nobody")

    task = asyncio.create_task(to_the_end(work()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended == [1]


async def test_to_the_end_gives_back_what_came_of_it():
    assert await to_the_end(value(7, turns=2)) == 7
    with pytest.raises(TypeError):
        await to_the_end(value(7, turns="x"))
