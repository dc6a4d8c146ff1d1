"""An object of as many parts as S3 allows, through a server; part sizes around the limits: tests/planning."""

import asyncio

import pytest

from ckpt_cloud.stores.base import MAX_PARTS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PIECE = 500


@pytest.fixture(params=["native"])
def engine(request):
    """The other engine sends the same requests, for minutes."""
    return request.param


async def test_s3(server, opened):
    store = opened()
    assert store.max_parts == MAX_PARTS == 10_000
    # Each byte tells where it belongs, as far as a byte can.
    content = bytes(number % 251 for number in range(MAX_PARTS))

    async def source():
        for at in range(0, len(content), PIECE):
            yield content[at : at + PIECE]
            await asyncio.sleep(0)

    await store.put_multipart("k", source, part_size=1, concurrency=8)

    assert [data for data, _, _ in server.dialect.objects.values()] == [content]
    numbers = [int(request.query["partNumber"]) for request in server.requests if "partNumber" in request.query]
    assert sorted(numbers) == list(range(1, MAX_PARTS + 1))
    assert server.dialect.uploads == {}
