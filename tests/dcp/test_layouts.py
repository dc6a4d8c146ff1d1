"""Every kind of parallelism that DCP knows, each loaded into each other, bit for bit, optimizer included."""

import layouts
import pytest
import ranks

LAYOUTS = ["ddp", "fsdp1", "fsdp1 flat", "fsdp2", "hsdp", "tp", "2-D"]


def saved_by_four(tmp_path, names):
    root = f"file://{tmp_path}/run"
    return root, ranks.run(4, layouts.save_all, tmp_path, names, root)[0]


def test_each_layout_into_each_other(tmp_path):
    root, saved = saved_by_four(tmp_path, LAYOUTS)
    assert [len(state) > 20 for state in saved.values()] == [True] * len(LAYOUTS)
    assert ranks.run(4, layouts.load_all, tmp_path, LAYOUTS, root, saved) == [[]] * 4


@pytest.mark.slow
def test_each_layout_on_fewer_ranks(tmp_path):
    root, saved = saved_by_four(tmp_path, LAYOUTS)
    assert ranks.run(2, layouts.load_all, tmp_path, ["ddp", "fsdp1", "fsdp2", "tp"], root, saved) == [[]] * 2
    assert layouts.load_all(["plain"], root, saved) == []


def test_from_one_process_to_many(tmp_path):
    root = f"file://{tmp_path}/run"
    saved = layouts.save_all(["plain"], root)
    assert ranks.run(4, layouts.load_all, tmp_path, LAYOUTS, root, saved) == [[]] * 4


def test_pipeline_stages(tmp_path):
    url = f"file://{tmp_path}/run/step-1"
    ranks.run(4, layouts.save_stages, tmp_path, url)
    assert ranks.run(4, layouts.load_stages, tmp_path, url) == [[]] * 4
    assert ranks.run(2, layouts.load_stages, tmp_path, url) == [[]] * 2


def test_sharded_tensors(tmp_path):
    root = f"file://{tmp_path}/run"
    ranks.run(4, layouts.save_sharded_tensors, tmp_path, root)
    assert ranks.run(4, layouts.load_sharded_tensors, tmp_path, root) == [[]] * 4
    assert ranks.run(2, layouts.load_sharded_tensors, tmp_path, root) == [[]] * 2


@pytest.mark.parametrize("case", [layouts.uneven_dtensors, layouts.submesh], ids=lambda case: case.__name__)
def test_shards_that_are_uneven_or_only_elsewhere(tmp_path, case):
    assert ranks.run(4, case, tmp_path, f"file://{tmp_path}/run") == [[]] * 4


def test_load_sharded_optimizer_state_dict(tmp_path):
    assert ranks.run(4, layouts.legacy_optimizer, tmp_path, f"file://{tmp_path}/run/step-1") == [(True, True)] * 4
