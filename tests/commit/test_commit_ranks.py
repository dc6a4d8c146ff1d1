"""What ranks report to the coordinator: nothing, too little, or what another reports too. Then there is no commit."""

import secrets

import pytest
import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

import ckpt_cloud
from ckpt_cloud.errors import CheckpointIncomplete, IncompleteSave

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
        pytest.param(lambda one, other: [one, other[:1]], id="a-rank-lost-a-result"),
        pytest.param(lambda one, _other: [one], id="a-rank-is-missing"),
        pytest.param(lambda one, other: [one, other, other], id="two-ranks-claim-one-chunk"),
        pytest.param(lambda one, other: [one + one[1:], other], id="a-rank-claims-a-chunk-twice"),
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
    claimed = [
        type(result)(one[number].index, result.size_in_bytes, result.storage_data)
        for number, result in enumerate(other)
    ]
    with pytest.raises(IncompleteSave):
        ranks.finish([one, claimed])
    with pytest.raises(CheckpointIncomplete):
        ranks.load()
