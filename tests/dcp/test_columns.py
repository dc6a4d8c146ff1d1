"""Shards of columns: stored side by side in chunks, so that other shardings fetch little more than they need."""

from weakref import WeakSet

import columns
import pytest
import ranks
import torch
from torch.distributed.checkpoint._extension import ZStandard
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

import ckpt_cloud
from ckpt_cloud import ObjectStoreReader, ObjectStoreWriter, TransferOptions
from ckpt_cloud.batch import sorted_out
from ckpt_cloud.errors import PlanMismatch

MIB = 1 << 20


def stored_chunks(url):
    return len(ObjectStoreReader(url).read_metadata().state_dict_metadata["w"].chunks)


def moved_by_three(url, tmp_path):
    """Bytes that three ranks fetch for those that they need, of what four saved."""
    loads = ranks.run(3, columns.load, tmp_path, url)
    assert [right for right, _, _ in loads] == [True] * 3
    return sum(moved for _, _, moved in loads) / sum(needed for _, needed, _ in loads)


def test_another_number_of_ranks_fetches_little_more_than_it_needs(tmp_path):
    ranks.run(4, columns.save, tmp_path, cut := f"file://{tmp_path}/cut")
    ranks.run(4, columns.save, tmp_path, uncut := f"file://{tmp_path}/uncut", 1)
    assert (stored_chunks(cut), stored_chunks(uncut)) == (16, 4)
    assert moved_by_three(cut, tmp_path) < 1.2
    assert moved_by_three(uncut, tmp_path) > 1.4
    right, needed, moved = zip(*ranks.run(2, columns.load, tmp_path, cut), strict=True)
    assert all(right)
    assert sum(moved) < sum(needed) + MIB


def test_rows_columns_and_both_into_each_other(tmp_path):
    assert ranks.run(4, columns.each_way, tmp_path, f"file://{tmp_path}/run") == [[]] * 4


def test_ranks_that_save_for_themselves(tmp_path):
    assert ranks.run(2, columns.each_for_itself, tmp_path, f"file://{tmp_path}/run/step-1") == [True] * 2


class ByColumns(DefaultSavePlanner):
    """Saves matrices as two shards of columns, without ranks."""

    def __init__(self, lie=False):
        super().__init__()
        self.lie = lie
        self.resolved = 0

    def create_local_plan(self):
        plan = super().create_local_plan()
        self.mappings = {}
        plan.items[:] = [half for item in plan.items for half in self.halves(item)]
        return plan

    def halves(self, item):
        data = item.tensor_data
        rows, width = data.size
        for at in (0, width // 2):
            chunk = ChunkStorageMetadata(torch.Size((0, at)), torch.Size((rows, width // 2)))
            yield WriteItem(
                MetadataIndex(item.index.fqn, torch.Size((0, at))),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, data.properties, data.size),
            )

    def resolve_data(self, item):
        self.resolved += 1
        half = item.tensor_data.chunk
        width = half.sizes[1] - (1 if self.lie else 0)
        return self.state_dict[item.index.fqn].narrow(1, half.offsets[1], width)


def matrices():
    generator = torch.Generator().manual_seed(7)
    big = torch.randint(-99, 99, (1024, 2048), generator=generator, dtype=torch.int32)
    return {"w": big, "z": torch.complex(big[:, :1024].float(), torch.zeros(1024, 1024)), "t": big.half().t()}


@pytest.mark.parametrize(
    "how",
    [{}, {"compression": "zstd"}, {"extensions": [ZStandard()]}, {"encryption_key": bytes(32)}],
    ids=lambda how: next(iter(how), "plain"),
)
def test_whatever_else_is_done_to_the_bytes(how, file_url):
    state, planner = matrices(), ByColumns()
    ckpt_cloud.save(state, storage_writer=ObjectStoreWriter(file_url, **how), planner=planner)
    # For each half once, however many chunks it makes.
    assert planner.resolved == 6
    assert stored_chunks(file_url) == 8 if "encryption_key" not in how else True
    loaded = {name: torch.zeros_like(value) for name, value in state.items()}
    reader = ObjectStoreReader(file_url, encryption_key=how.get("encryption_key"))
    ckpt_cloud.load(loaded, storage_reader=reader)
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


def test_a_small_budget_holds(file_url):
    state = matrices()
    few = TransferOptions(part_size=5 * MIB, memory_budget=10 * MIB, range_size=MIB)
    ckpt_cloud.save(state, storage_writer=ObjectStoreWriter(file_url, transfer=few), planner=ByColumns())
    loaded = {name: torch.zeros_like(value) for name, value in state.items()}
    ckpt_cloud.load(loaded, storage_reader=ObjectStoreReader(file_url, transfer=few))
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


class Copies(ByColumns):
    """Each shard it resolves is a new tensor, which lives as long as somebody needs it."""

    def resolve_data(self, item):
        value = super().resolve_data(item).clone()
        self.alive.add(value)
        return value


def test_a_shard_lives_until_its_last_chunk_was_asked_for_even_where_an_upload_begins_again():
    planner = Copies()
    planner.alive = WeakSet()
    planner.set_up_planner({"w": matrices()["w"]}, is_coordinator=True)
    batch = sorted_out(planner.create_local_plan().items, planner, inline_limit=0, most_chunks=4)
    # Others may take another way, as those that are compressed do.
    chosen = [number for number, owner in enumerate(batch.owners) if owner == 0 or number % 2]
    source = batch.source(planner, chosen)
    for number in [*range(len(chosen)), 0, 1, 1, len(chosen) - 1]:
        assert source.view(number) is None, "a part of each row"
        assert planner.alive
        source.release(number)
    assert not planner.alive


class Converts(DefaultSavePlanner):
    """Makes what it resolves."""

    def resolve_data(self, item):
        return super().resolve_data(item).clone()


class Gathers(DefaultSavePlanner):
    """Makes what it looks up."""

    def lookup_object(self, index):
        return super().lookup_object(index).clone()


@pytest.mark.parametrize("kind", [DefaultSavePlanner, Converts, Gathers])
def test_only_what_is_the_states_own_is_there_anyway(kind):
    planner = kind()
    state = {"w": torch.ones(100), "conj": torch.ones(100, dtype=torch.complex64).conj()}
    planner.set_up_planner(state, is_coordinator=True)
    batch = sorted_out(planner.create_local_plan().items, planner, inline_limit=0, most_chunks=4)
    source = batch.source(planner, range(len(batch.entries)))
    lasting = set()
    for number, entry in enumerate(batch.entries):
        if source.view(number) is not None and source.lasts(number):
            lasting.add(entry.fqn)
    assert lasting == ({"w"} if kind is DefaultSavePlanner else set())


def test_a_planner_that_resolves_another_shape_is_refused(file_url):
    with pytest.raises(PlanMismatch, match=r"was planned as .* and resolved to complex64 .1024, 511"):
        ckpt_cloud.save(matrices(), storage_writer=ObjectStoreWriter(file_url), planner=ByColumns(lie=True))
