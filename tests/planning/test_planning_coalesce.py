"""Spans to ranged reads: all covered, to whole blocks, ascending, bounded, and no byte twice without need."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from ckpt_cloud.planning.coalesce import Range, Span, coalesce

SIZE = 400

blocks = st.integers(1, 50)
limits = st.integers(1, 200)
gap_sizes = st.integers(0, 100)


def numbered(pairs):
    return [Span(low, low + length, number) for number, (low, length) in enumerate(pairs) if low + length <= SIZE]


any_spans = st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(1, 120)), max_size=15).map(numbered)


@st.composite
def disjoint_spans(draw):
    edges = sorted(draw(st.sets(st.integers(0, SIZE), max_size=24)))
    spans = [Span(low, high, number) for number, (low, high) in enumerate(pairwise(edges)) if draw(st.booleans())]
    return draw(st.permutations(spans))


def planned(spans, block, max_range, max_gap):
    return list(coalesce(spans, object_size=SIZE, block=block, max_range=max_range, max_gap=max_gap))


@given(any_spans, blocks, limits, gap_sizes)
def test_every_span_lies_in_one_range(spans, block, max_range, max_gap):
    ranges = planned(spans, block, max_range, max_gap)

    assert sorted((s for r in ranges for s in r.spans), key=lambda s: s.piece) == spans
    assert all(r.start <= s.start and s.end <= r.end for r in ranges for s in r.spans)


@given(any_spans, blocks, limits, gap_sizes)
def test_ranges_are_whole_blocks_with_a_span_at_each_end(spans, block, max_range, max_gap):
    for found in planned(spans, block, max_range, max_gap):
        assert 0 <= found.start < found.end <= SIZE
        assert found.start == min(s.start for s in found.spans) // block * block
        assert found.end == min(SIZE, -(-max(s.end for s in found.spans) // block) * block)


@given(any_spans, blocks, limits, gap_sizes)
def test_ranges_ascend(spans, block, max_range, max_gap):
    for before, after in pairwise(planned(spans, block, max_range, max_gap)):
        assert before.start <= after.start
        assert before.end < after.end


@given(disjoint_spans(), blocks, limits, gap_sizes)
def test_ranges_of_disjoint_spans_share_one_block_at_most(spans, block, max_range, max_gap):
    for before, after in pairwise(planned(spans, block, max_range, max_gap)):
        assert after.start >= (before.end - 1) // block * block


@given(any_spans, blocks, limits, gap_sizes)
def test_a_range_over_the_limit_is_one_long_span(spans, block, max_range, max_gap):
    for found in planned(spans, block, max_range, max_gap):
        if found.end - found.start > max_range:
            first = found.spans[0]
            assert found.start == first.start // block * block
            assert found.end == min(SIZE, -(-first.end // block) * block)


@given(any_spans, blocks, limits, gap_sizes)
def test_gaps_are_bounded(spans, block, max_range, max_gap):
    for found in planned(spans, block, max_range, max_gap):
        reached = found.start
        for span in found.spans:
            assert span.start // block * block <= reached + max_gap
            reached = max(reached, min(SIZE, -(-span.end // block) * block))


@given(any_spans, blocks, limits, gap_sizes)
def test_ranges_that_could_be_one_are_one(spans, block, max_range, max_gap):
    for before, after in pairwise(planned(spans, block, max_range, max_gap)):
        first = after.spans[0]
        together = max(before.end, min(SIZE, -(-first.end // block) * block)) - before.start
        assert after.start > before.end + max_gap or together > max_range


def test_the_same_bytes_wanted_twice_are_fetched_once():
    twice = [Span(3, 103, 0), Span(3, 103, 1), Span(50, 60, 2)]
    # Unaligned, so that whole blocks make the range longer than the limit.
    assert planned(twice, 8, 100, 0) == [Range(0, 104, (twice[0], twice[1], twice[2]))]
