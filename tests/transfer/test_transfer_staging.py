"""Staging: within the budget, reused, and never while anybody still looks at it."""

import asyncio
import gc
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_cloud.transfer.budget import Budget
from ckpt_cloud.transfer.staging import Staging, plain_memory

pytestmark = pytest.mark.timeout(30)
PART = 8


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


def made(total):
    budget = Budget(total)
    allocated = []

    def allocate(size):
        allocated.append(size)
        return plain_memory(size)

    return budget, Staging(budget, PART, allocate), allocated


async def test_a_buffer_gives_its_share_back_when_the_last_user_lets_go():
    budget, staging, _ = made(10)
    buffer = await staging.lend(7)
    view = memoryview(buffer)[2:3]
    del buffer
    gc.collect()
    await settle()
    assert budget.used_bytes == PART
    view.release()
    del view
    await settle()
    assert budget.used_bytes == 0


async def test_memory_is_reused_only_once_nobody_looks_at_it():
    _, staging, allocated = made(100)
    first = await staging.lend(PART)
    first[:] = b"12345678"
    kept = first[2:4]
    del first
    await settle()
    second = await staging.lend(PART)
    second[:] = b"abcdefgh"
    assert bytes(kept) == b"34"
    assert allocated == [PART, PART]
    del kept, second
    await settle()
    for size in (PART, 5):
        third = await staging.lend(size)
        assert len(third) == size
        del third
        await settle()
    assert allocated == [PART, PART]


async def test_a_buffer_may_be_dropped_on_another_thread():
    budget, staging, _ = made(10)
    held = [await staging.lend(PART)]
    waiter = asyncio.create_task(staging.lend(PART))
    await settle()
    assert not waiter.done()
    thread = threading.Thread(target=held.clear)
    thread.start()
    await asyncio.wait_for(waiter, 5)
    thread.join()
    assert budget.peak_bytes == PART


async def test_memory_that_cannot_be_had_takes_no_share():
    budget = Budget(10)

    def none(size):
        raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        await Staging(budget, PART, none).lend(4)
    assert budget.used_bytes == 0


def test_a_buffer_may_outlive_its_loop():
    async def leave():
        return await made(10)[1].lend(5)

    buffer = asyncio.run(leave())
    assert len(buffer) == 5
    del buffer
    gc.collect()


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 3)), max_size=25), st.integers(16, 60))
def test_lent_and_kept_together_stay_within_the_budget(requests, total):
    """Unless a single buffer alone is larger."""

    async def everybody():
        budget = Budget(total)
        alive = []

        class Memory(bytearray):
            def __del__(self):
                alive.remove(len(self))

        def allocate(size):
            import numpy as np

            alive.append(size)
            assert sum(alive) <= max(total, size)
            return np.frombuffer(Memory(size), dtype=np.uint8)

        staging = Staging(budget, PART, allocate)

        async def use(size, turns):
            lent = await staging.lend(size)
            for _ in range(turns):
                await asyncio.sleep(0)
            assert len(lent) == size

        await asyncio.wait_for(asyncio.gather(*(use(*request) for request in requests)), 10)
        await settle()
        assert budget.used_bytes == 0

    asyncio.run(everybody())
