"""One budget: never overdrawn, first come first served, and everything comes back."""

import asyncio
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_cloud.transfer.budget import Budget

pytestmark = pytest.mark.timeout(30)


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


def waiting(budget):
    return int(repr(budget).split(", ")[1].split()[0])


async def test_grants_at_once_what_is_free():
    budget = Budget(10)
    await asyncio.wait_for(budget.take(4), 1)
    await asyncio.wait_for(budget.take(6), 1)
    assert (budget.used_bytes, budget.peak_bytes) == (10, 10)
    assert repr(budget) == "<Budget 10 of 10 bytes used, 0 waiting>"


async def test_first_come_first_served():
    budget = Budget(10)
    await budget.take(8)
    served = []

    async def take(name, size):
        await budget.take(size)
        served.append(name)

    tasks = [asyncio.create_task(take(*request)) for request in (("large", 5), ("small", 1), ("medium", 3))]
    await settle()
    assert served == []  # the small one would fit, but was not first
    budget.give_back(8)
    await asyncio.gather(*tasks)
    assert served == ["large", "small", "medium"]
    assert budget.used_bytes == 9


async def test_more_than_all_is_granted_alone():
    budget = Budget(10)
    await budget.take(1)
    large = asyncio.create_task(budget.take(25))
    await settle()
    assert not large.done()
    budget.give_back(1)
    await large
    after = asyncio.create_task(budget.take(1))
    await settle()
    assert not after.done()
    budget.give_back(25)
    await after
    assert budget.used_bytes == 1


async def test_cancelled_while_it_waits():
    budget = Budget(10)
    await budget.take(7)
    large, small = asyncio.create_task(budget.take(9)), asyncio.create_task(budget.take(3))
    await settle()
    large.cancel()
    await settle()
    assert small.done(), "who waited behind it fits and need not wait for anybody"
    assert (budget.used_bytes, waiting(budget)) == (10, 0)


async def test_cancelled_just_as_it_is_granted():
    budget = Budget(10)
    await budget.take(10)
    first, second = asyncio.create_task(budget.take(6)), asyncio.create_task(budget.take(6))
    await settle()
    budget.give_back(10)
    first.cancel()  # its turn has come, and it has not run since
    with pytest.raises(asyncio.CancelledError):
        await first
    await asyncio.wait_for(second, 1)
    assert budget.used_bytes == 6


async def test_a_share_comes_back_with_what_it_was_taken_for():
    budget = Budget(10)
    await budget.take(3)
    held = [memoryview(b"abc")]
    budget.give_back_with(held[0], 3)
    await settle()
    assert budget.used_bytes == 3
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    await settle()
    assert budget.used_bytes == 0


@given(st.lists(st.tuples(st.integers(0, 14), st.integers(0, 4), st.booleans()), max_size=20), st.integers(1, 10))
def test_never_over_and_all_comes_back(workers, total):
    """Workers take, hold for some turns, and give back; some are cancelled on the way."""

    async def everybody():
        budget, held = Budget(total), []

        async def work(size, turns):
            await budget.take(size)
            try:
                held.append(size)
                assert sum(held) <= max(total, *held)
                assert budget.used_bytes >= sum(held)
                for _ in range(turns):
                    await asyncio.sleep(0)
            finally:
                held.remove(size)
                budget.give_back(size)

        tasks = [asyncio.create_task(work(size, turns)) for size, turns, _ in workers]
        for task, (_, turns, cancelled) in zip(tasks, workers, strict=True):
            if cancelled:
                for _ in range(turns):
                    await asyncio.sleep(0)
                task.cancel()
        results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
        assert [r for r in results if r is not None and not isinstance(r, asyncio.CancelledError)] == []
        assert budget.used_bytes == 0
        assert waiting(budget) == 0
        assert budget.peak_bytes <= max([total, *(size for size, _, _ in workers)])

    asyncio.run(everybody())
