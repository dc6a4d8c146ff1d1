"""What ranks report to the coordinator: nothing, too little, or what another reports too. Then there is no commit."""

import secrets
from dataclasses import replace

import pytest
import torch
from msgspec import structs
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

import ckpt_cloud
from ckpt_cloud import bridge
from ckpt_cloud.errors import AttemptAborted, CheckpointIncomplete, IncompleteSave
from ckpt_cloud.format import register as registers
from ckpt_cloud.format.register import Register
from ckpt_cloud.metadata import Uploaded
from ckpt_cloud.options import StoreOptions
from ckpt_cloud.stores import open_store, parse_url

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


class Ranks:
    """Two ranks of one save, in one process, each with half of a tensor and an item of its own."""

    def __init__(self):
        self.url = f"memory://{secrets.token_hex(6)}/run/it"
        self.writers = [ckpt_cloud.ObjectStoreWriter(self.url) for _ in range(2)]
        planners = [DefaultSavePlanner() for _ in self.writers]
        plans = []
        for rank, (writer, planner) in enumerate(zip(self.writers, planners, strict=True)):
            state = {f"w{rank}": torch.full((300,), float(rank)), f"note{rank}": "x" * 100_000}
            planner.set_up_planner(state, None, is_coordinator=rank == 0)
            writer.set_up_storage_writer(is_coordinator=rank == 0)
            plans.append(writer.prepare_local_plan(planner.create_local_plan()))
        plans, self.metadata = planners[0].create_global_plan(plans)
        plans = self.writers[0].prepare_global_plan(plans)
        self.results = [
            writer.write_data(planner.finish_plan(plan), planner).value()
            for writer, planner, plan in zip(self.writers, planners, plans, strict=True)
        ]

    def finish(self, results):
        self.writers[0].finish(self.metadata, results)

    def load(self):
        state = {"w0": torch.zeros(300), "w1": torch.zeros(300)}
        ckpt_cloud.load(state, checkpoint_id=self.url)
        return state


def changed(results, *, twice=False, **fields):
    """A rank's report with other contents."""
    (result,) = results
    uploaded = Uploaded.decode(result.storage_data)
    if twice:
        fields = {name: getattr(uploaded, name) * 2 for name in ("names", "offsets", "places")}
    return [replace(result, storage_data=structs.replace(uploaded, **fields).encode())]


@pytest.fixture
def ranks():
    return Ranks()


def test_all_report(ranks):
    ranks.finish(ranks.results)
    assert ranks.load()["w1"].eq(1).all()


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda one, _other: [one, []], id="a-rank-reports-nothing"),
        pytest.param(
            lambda one, other: [one, changed(other, names=[], offsets=[], places=[])], id="a-rank-lost-a-chunk"
        ),
        pytest.param(lambda one, _other: [one], id="a-rank-is-missing"),
        pytest.param(lambda one, other: [one, other, other], id="two-ranks-claim-one-chunk"),
        pytest.param(lambda one, other: [changed(one, twice=True), other], id="a-rank-claims-a-chunk-twice"),
        pytest.param(lambda one, other: [one, changed(other, objects=[])], id="a-rank-has-no-such-object"),
        pytest.param(lambda one, other: [one, [*other, *other]], id="a-rank-reports-twice"),
    ],
)
def test_what_does_not_add_up_is_not_committed(ranks, spoil):
    with pytest.raises(IncompleteSave):
        ranks.finish(spoil(*ranks.results))
    with pytest.raises(CheckpointIncomplete):
        ranks.load()


def test_two_ranks_claim_one_chunk_with_other_bytes(ranks):
    """Each rank's results as they are, but the second says that its tensor is the first one's."""
    one, other = ranks.results
    claimed = changed(other, names=Uploaded.decode(one[0].storage_data).names)
    with pytest.raises(IncompleteSave):
        ranks.finish([one, claimed])
    with pytest.raises(CheckpointIncomplete):
        ranks.load()


def test_the_fence_is_held_against_the_oldest_rank(ranks):
    """A collector that raised it between the ranks' ids took the data of the one below."""
    one, other = ranks.results
    fence = min(Uploaded.decode(each[0].storage_data).attempt for each in (one, other))
    store = open_store(parse_url(ranks.url), StoreOptions())
    bridge.run(store.put("COMMIT", registers.encode(Register("aborted", fence, fence))))
    with pytest.raises(AttemptAborted):
        ranks.finish([one, changed(other, attempt=f"{1:032x}")])
    ranks.finish([one, other])
    assert ranks.load()["w1"].eq(1).all()
