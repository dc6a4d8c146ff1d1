"""Real ranks: sharded state saved on some, loaded on others."""

import cases
import pytest
import ranks
import torch

import ckpt_cloud


@pytest.mark.parametrize(
    ("place", "worlds"),
    [
        ("file", (3,)),
        pytest.param("file", (1, 2, 8), marks=pytest.mark.slow),
        pytest.param("s3", (3,), marks=pytest.mark.slow),
    ],
)
def test_fsdp2_from_four_ranks_to_any_number(place, worlds, tmp_path, request, monkeypatch):
    url = f"file://{tmp_path}/run/step-3"
    if place == "s3":
        server = request.getfixturevalue("seaweedfs")
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        server.create_bucket("fsdp-ranks")
        url = "s3://fsdp-ranks/run/step-3"
    saved = ranks.run(4, cases.save_fsdp, tmp_path, url)[0]
    assert ckpt_cloud.latest(url.rpartition("/")[0]) == url
    for world in worlds:
        for loaded in ranks.run(world, cases.load_fsdp, tmp_path, url):
            assert cases.same(loaded["model"], saved["model"]), world
            assert cases.same(loaded["optimizer"], saved["optimizer"]), world
            assert loaded["step"] == 3


def test_dtensors_of_every_placement_into_every_other(tmp_path):
    assert ranks.run(4, cases.every_placement, tmp_path, f"file://{tmp_path}/run") == [[]] * 4


def test_all_ranks_are_told_what_failed_on_one(tmp_path):
    told = ranks.run(2, cases.failures, tmp_path, f"file://{tmp_path}/run")
    assert told[0] == told[1]
    kinds = {name: error and error[0] for name, error in told[0].items()}
    assert kinds == {
        "missing": "CheckpointNotFound",
        "rank 1 write": "RankFailed",
        "exists": "CheckpointExists",
        "rank 1 read": "RankFailed",
        "shape": "StateMismatch",
        "bucket": "InvalidURL",
    }
    assert "only here" in told[0]["rank 1 write"][1]
    left = [path for path in (tmp_path / "run" / "failed").rglob("*") if path.is_file()]
    assert left == []


def test_bad_input_is_refused_alike_on_all_ranks(tmp_path):
    for name in ("good", "newer", "flag", "manifest"):
        ckpt_cloud.save({"w": torch.ones(6, 2), "n": 1}, checkpoint_id=f"{tmp_path}/run/{name}")
    for name, old, new in (
        ("newer", '"version": 2', '"version": 3'),
        ("flag", '"flags": []', '"flags": ["time-travel"]'),
    ):
        commit = tmp_path / "run" / name / "COMMIT"
        assert old in commit.read_text()
        commit.write_text(commit.read_text().replace(old, new))
    (manifest,) = (tmp_path / "run/manifest/data").rglob("manifest")
    manifest.write_bytes(manifest.read_bytes()[:-1])
    told = ranks.run(2, cases.bad_input, tmp_path, f"file://{tmp_path}/run")
    assert told[0] == told[1]
    expected = {
        "newer": ("Unsupported", "version 3"),
        "flag": ("Unsupported", "time-travel"),
        "manifest": ("CorruptManifest", ""),
        "shape": ("StateMismatch", "w: stored shape (6, 2), state (7, 2)"),
        "dtype": ("StateMismatch", "w: stored torch.float32, state torch.int64"),
        "key": ("StateMismatch", "only here is not in the checkpoint"),
        "kind": ("StateMismatch", "w: stored as a tensor of shape (6, 2), state has int"),
    }
    for name, (kind, said) in expected.items():
        assert told[0][name][0] == kind, name
        assert said in told[0][name][1], name


def test_other_ways_to_call(tmp_path):
    assert ranks.run(3, cases.other_calls, tmp_path, f"file://{tmp_path}/run") == [[]] * 3
    # A part of the tensor lies in each rank's own; filling only that part would be a wrong tensor.
    ((kind, said),) = ranks.run(1, cases.load_own, tmp_path, f"file://{tmp_path}/run/alone")
    assert kind == "StateMismatch"
    assert "3 ranks" in said
