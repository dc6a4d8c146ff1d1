"""`ckpt_cloud.convert` between any two formats, and what others make of the result."""

import json
import zipfile
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import ckpt_cloud
from ckpt_cloud.errors import CheckpointExists, CorruptFile, InvalidOption, StoreUnavailable, UnsupportedTensor
from ckpt_cloud.interop import dcp_layout, objects, own_format
from tests.interop.states import same, zeros_like

FORMATS = ("ckpt-cloud", "dcp", "torch", "safetensors")


def plain(state):
    """What safetensors can hold of it."""
    return {key: value for key, value in state.items() if isinstance(value, torch.Tensor) and not value.is_complex()}


@pytest.fixture(params=FORMATS)
def source(request, state, tmp_path):
    """A state, and the URL of a checkpoint of it in each format."""
    at = tmp_path / "source"
    if request.param == "ckpt-cloud":
        ckpt_cloud.save(state, checkpoint_id=f"file://{at}", no_dist=True)
    elif request.param == "dcp":
        dcp.save(state, checkpoint_id=str(at), no_dist=True)
    elif request.param == "torch":
        torch.save(state, at)
    else:
        from safetensors.torch import save_file

        state = plain(state)
        at = at.with_suffix(".safetensors")
        save_file(state, at)
    return state, f"file://{at}"


@pytest.mark.parametrize("to", ["ckpt-cloud", "dcp", "torch"])
def test_any_format_to_any_other(source, to, tmp_path):
    state, url = source
    done = ckpt_cloud.convert(url, f"file://{tmp_path}/out", to=to)
    got = zeros_like(state)
    ckpt_cloud.load(got, checkpoint_id=f"file://{tmp_path}/out", no_dist=True)
    assert same(got, state)
    assert done.tensors + done.items == len(ckpt_cloud.open(url))
    assert done.left_out == []
    assert ckpt_cloud.open(f"file://{tmp_path}/out").format == to


def test_any_format_to_safetensors(source, tmp_path):
    state, url = source
    if "complex" in state:
        with pytest.raises(UnsupportedTensor, match="complex"):
            ckpt_cloud.convert(url, f"file://{tmp_path}/out", to="safetensors")
        assert not (tmp_path / "out").exists()
        return
    ckpt_cloud.convert(url, f"file://{tmp_path}/out", to="safetensors")
    assert same(load_file(tmp_path / "out" / "model.safetensors"), state)


def test_stock_dcp_opens_what_is_written_as_dcp(state, tmp_path):
    ckpt_cloud.save(state, checkpoint_id=f"file://{tmp_path}/ours", no_dist=True)
    ckpt_cloud.convert(tmp_path / "ours", tmp_path / "theirs", to="dcp")
    got = zeros_like(state)
    dcp.load(got, storage_reader=FileSystemReader(tmp_path / "theirs"), no_dist=True)
    assert same(got, state)
    dcp_to_torch_save(tmp_path / "theirs", tmp_path / "x.pt")
    assert same(torch.load(tmp_path / "x.pt", weights_only=True)["nested"]["half"], state["nested"]["half"])


def test_stock_fsspec_reader_opens_what_is_written_as_dcp_on_s3(state, moto_url, moto_server):
    ckpt_cloud.save(state, checkpoint_id=f"{moto_url}/ours", no_dist=True)
    ckpt_cloud.convert(f"{moto_url}/ours", f"{moto_url}/theirs", to="dcp")
    got = zeros_like(state)
    client = {"endpoint_url": moto_server.endpoint_url}
    dcp.load(got, storage_reader=FsspecReader(f"{moto_url}/theirs", client_kwargs=client), no_dist=True)
    assert same(got, state)


def test_torch_opens_what_is_written_as_torch(state, tmp_path):
    ckpt_cloud.save(state, checkpoint_id=f"file://{tmp_path}/ours", no_dist=True)
    ckpt_cloud.convert(tmp_path / "ours", tmp_path / "x.pt", to="torch")
    assert same(torch.load(tmp_path / "x.pt", weights_only=True), state)
    assert same(torch.load(tmp_path / "x.pt", weights_only=True, mmap=True), state)
    assert zipfile.ZipFile(tmp_path / "x.pt").testzip() is None


def test_tensors_within_items_stay_plain_data(tmp_path):
    """A tuple is one item for DCP, tensors and all."""
    inside = (torch.arange(6).reshape(2, 3).t(), 3, torch.ones(2, dtype=torch.float8_e5m2), torch.tensor(2.5))
    state = {"a": torch.zeros(3), "pair": inside, "one": (torch.nn.Parameter(torch.ones(2)),), "raw": b"ab"}
    ckpt_cloud.save(state, checkpoint_id=f"file://{tmp_path}/ours", no_dist=True)
    ckpt_cloud.convert(tmp_path / "ours", tmp_path / "x.pt", to="torch")
    ckpt_cloud.convert(tmp_path / "x.pt", tmp_path / "again", to="ckpt-cloud")
    ours = ckpt_cloud.open(tmp_path / "again")
    for got in (torch.load(tmp_path / "x.pt", weights_only=True), {key: ours[key] for key in ours}):
        assert same(list(got["pair"]), list(inside))
        assert torch.equal(got["one"][0], torch.ones(2))
        assert got["raw"] == b"ab"


def test_a_repository_of_many_files(tmp_path):
    state = {f"layer.{number}": torch.full((100,), float(number)) for number in range(7)} | {"step": 5}
    ckpt_cloud.save(state, checkpoint_id=f"file://{tmp_path}/ours", no_dist=True)
    done = ckpt_cloud.convert(tmp_path / "ours", tmp_path / "repo", to="safetensors", max_shard_bytes=900)
    assert done.left_out == ["step"]
    names = sorted(path.name for path in (tmp_path / "repo").iterdir())
    assert names == [*(f"model-{n:05d}-of-00004.safetensors" for n in range(1, 5)), "model.safetensors.index.json"]
    index = json.loads((tmp_path / "repo" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2800
    for key, name in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / "repo" / name)[key], state[key])
    assert ckpt_cloud.open(tmp_path / "repo").format == "safetensors"


def test_windows_and_chunks_smaller_than_tensors(state, tmp_path, monkeypatch):
    """So that every boundary is met: tensors cut into windows, several in one, files and batches of parts of them."""
    monkeypatch.setattr(objects, "WINDOW_BYTES", 10_000)
    monkeypatch.setattr(dcp_layout, "FILE_BYTES", 150_000)
    monkeypatch.setattr(dcp_layout.chunks, "__defaults__", (100_000,))
    monkeypatch.setattr(own_format, "BATCH_BYTES", 70_000)
    url = f"file://{tmp_path}/ours"
    ckpt_cloud.save(state, checkpoint_id=url, no_dist=True)
    for to in ("dcp", "ckpt-cloud", "torch"):
        ckpt_cloud.convert(url, f"file://{tmp_path}/{to}", to=to)
        got = zeros_like(state)
        ckpt_cloud.load(got, checkpoint_id=f"file://{tmp_path}/{to}", no_dist=True)
        assert same(got, state)
        url = f"file://{tmp_path}/{to}"
    got = zeros_like(state)
    dcp.load(got, storage_reader=FileSystemReader(tmp_path / "dcp"), no_dist=True)
    assert same(got, state)


@pytest.mark.parametrize("to", FORMATS)
def test_what_is_there_is_kept_unless_overwritten(tmp_path, to):
    ckpt_cloud.save({"a": torch.ones(3)}, checkpoint_id=f"file://{tmp_path}/ours", no_dist=True)
    ckpt_cloud.save({"a": torch.zeros(3)}, checkpoint_id=f"file://{tmp_path}/other", no_dist=True)
    out = f"file://{tmp_path}/out"
    ckpt_cloud.convert(tmp_path / "ours", out, to=to)
    with pytest.raises(CheckpointExists):
        ckpt_cloud.convert(tmp_path / "other", out, to=to)
    assert ckpt_cloud.open(out)["a"].eq(1).all()
    ckpt_cloud.convert(tmp_path / "other", out, to=to, overwrite=True)
    assert ckpt_cloud.open(out)["a"].eq(0).all()


@pytest.mark.parametrize("to", ["dcp", "safetensors", "torch"])
def test_a_checkpoint_of_ours_is_never_mixed_with_another_format(tmp_path, to):
    ckpt_cloud.save({"a": torch.ones(3)}, checkpoint_id=f"file://{tmp_path}/ours", no_dist=True)
    out = f"file://{tmp_path}/ours" + ("/x.pt" if to == "torch" else "")
    with pytest.raises(CheckpointExists, match="COMMIT"):
        ckpt_cloud.convert(tmp_path / "ours", out, to=to, overwrite=True)


@pytest.mark.parametrize("to", FORMATS)
def test_a_failed_conversion_leaves_nothing_behind(tmp_path, to, store_faults):
    ckpt_cloud.save(
        {f"{n}": torch.ones(30_000) for n in range(4)}, checkpoint_id=f"file://{tmp_path}/ours", no_dist=True
    )
    store_faults.fail("put", "*", StoreUnavailable, times=1)
    with pytest.raises(StoreUnavailable):
        ckpt_cloud.convert(tmp_path / "ours", tmp_path / "out", to=to)
    assert [path for path in Path(tmp_path).rglob("*") if "out" in path.parts and path.is_file()] == []


def test_a_damaged_source_ends_in_its_error(tmp_path):
    torch.save({"a": torch.zeros(30_000)}, tmp_path / "x.pt")
    data = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(data[:-10])
    with pytest.raises(CorruptFile):
        ckpt_cloud.convert(tmp_path / "x.pt", tmp_path / "out", to="dcp")


@pytest.fixture
def damaged(tmp_path):
    """A checkpoint of two tensors that opens, and fails when the second is read."""
    dcp.save({"a": torch.ones(60_000), "b": torch.ones(60_000)}, checkpoint_id=str(tmp_path / "damaged"), no_dist=True)
    file = tmp_path / "damaged" / "__0_0.distcp"
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    return tmp_path / "damaged"


@pytest.mark.parametrize("to", FORMATS)
def test_a_failed_replacement_leaves_what_was_there(tmp_path, damaged, to):
    ckpt_cloud.save({"old": torch.arange(5)}, checkpoint_id=f"file://{tmp_path}/ours", no_dist=True)
    out = tmp_path / "out"
    ckpt_cloud.convert(tmp_path / "ours", out, to=to)
    before = sorted(path for path in tmp_path.rglob("*") if path.is_file() and "out" in path.parts)
    with pytest.raises(CorruptFile, match="'b' cannot be opened") as failed:
        ckpt_cloud.convert(damaged, out, to=to, overwrite=True)
    assert "weights_only" not in str(failed.value)
    assert torch.equal(ckpt_cloud.open(out)["old"], torch.arange(5))
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file() and "out" in path.parts) == before


def test_a_failed_replacement_by_other_files_leaves_the_repository(tmp_path, damaged):
    ckpt_cloud.save({f"{n}": torch.full((5,), n) for n in range(3)}, checkpoint_id=f"file://{tmp_path}/ours")
    ckpt_cloud.convert(tmp_path / "ours", tmp_path / "out", to="safetensors", max_shard_bytes=1)
    before = sorted((tmp_path / "out").iterdir())
    assert len(before) == 4
    with pytest.raises(CorruptFile):
        ckpt_cloud.convert(damaged, tmp_path / "out", to="safetensors", max_shard_bytes=1, overwrite=True)
    assert sorted((tmp_path / "out").iterdir()) == before
    assert ckpt_cloud.open(tmp_path / "out")["2"].eq(2).all()


@pytest.mark.parametrize("to", FORMATS)
def test_onto_itself(state, tmp_path, to):
    state = plain(state)
    ckpt_cloud.save(state, checkpoint_id=f"file://{tmp_path}/ours", no_dist=True)
    ckpt_cloud.convert(tmp_path / "ours", tmp_path / "out", to=to)
    for _ in range(2):
        ckpt_cloud.convert(tmp_path / "out", tmp_path / "out", to=to, overwrite=True)
    got = zeros_like(state)
    ckpt_cloud.load(got, checkpoint_id=f"file://{tmp_path}/out", no_dist=True)
    assert same(got, state)
    if to == "dcp":
        assert len(list((tmp_path / "out").iterdir())) == 2
        got = zeros_like(state)
        dcp.load(got, storage_reader=FileSystemReader(tmp_path / "out"), no_dist=True)
        assert same(got, state)


def test_files_of_the_source_are_not_replaced_while_they_are_read(tmp_path):
    state = {f"{n}": torch.full((5,), n) for n in range(3)}
    ckpt_cloud.save(state, checkpoint_id=f"file://{tmp_path}/ours", no_dist=True)
    out = tmp_path / "out"
    ckpt_cloud.convert(tmp_path / "ours", out, to="safetensors", max_shard_bytes=1)
    with pytest.raises(InvalidOption, match="files of the source"):
        ckpt_cloud.convert(out, out, to="safetensors", max_shard_bytes=1, overwrite=True)
    assert same(dict(ckpt_cloud.open(out)), state)


@pytest.mark.parametrize(("old", "new"), [(1, 10**6), (10**6, 1), (1, 60), (60, 1), (1, 1)])
def test_a_replaced_repository_leaves_no_files(tmp_path, old, new):
    """Not even a model.safetensors, which Hugging Face's libraries would load rather than the index."""
    first = {f"{n}": torch.full((5,), n) for n in range(4)}
    second = {f"{n}": torch.full((5,), 10 + n) for n in range(1, 5)}
    ckpt_cloud.save(first, checkpoint_id=f"file://{tmp_path}/first", no_dist=True)
    ckpt_cloud.save(second, checkpoint_id=f"file://{tmp_path}/second", no_dist=True)
    ckpt_cloud.convert(tmp_path / "first", tmp_path / "out", to="safetensors", max_shard_bytes=old)
    ckpt_cloud.convert(tmp_path / "second", tmp_path / "out", to="safetensors", max_shard_bytes=new, overwrite=True)
    ckpt_cloud.convert(tmp_path / "second", tmp_path / "fresh", to="safetensors", max_shard_bytes=new)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        path.name for path in (tmp_path / "fresh").iterdir()
    )
    assert same(dict(ckpt_cloud.open(tmp_path / "out")), second)


def test_files_that_the_old_index_names_go_too(tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "out").mkdir()
    save_file({"a": torch.ones(3)}, tmp_path / "out" / "weights.safetensors")
    (tmp_path / "out" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "weights.safetensors"}}')
    ckpt_cloud.save({"a": torch.zeros(3)}, checkpoint_id=f"file://{tmp_path}/ours", no_dist=True)
    ckpt_cloud.convert(tmp_path / "ours", tmp_path / "out", to="safetensors", overwrite=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]


def test_the_name_that_a_header_needs_itself(tmp_path):
    state = {"__metadata__": torch.ones(3), "b": torch.ones(2)}
    ckpt_cloud.save(state, checkpoint_id=f"file://{tmp_path}/ours", no_dist=True)
    with pytest.raises(UnsupportedTensor, match="__metadata__"):
        ckpt_cloud.convert(tmp_path / "ours", tmp_path / "out", to="safetensors")
    ckpt_cloud.convert(tmp_path / "ours", tmp_path / "out", to="dcp")
    assert same(dict(ckpt_cloud.open(tmp_path / "out")), state)


def test_an_unknown_format_is_told(tmp_path):
    with pytest.raises(InvalidOption, match="ckpt-cloud, dcp, safetensors, torch"):
        ckpt_cloud.convert(tmp_path, tmp_path / "out", to="onnx")


def test_fp8_is_multiplied_out_on_the_way(tmp_path):
    from safetensors.torch import save_file

    weights = {"l.weight": torch.ones(200, 100).to(torch.float8_e4m3fn), "l.weight_scale_inv": torch.full((2, 1), 3.0)}
    save_file(weights, tmp_path / "model.safetensors")
    ckpt_cloud.convert(tmp_path, tmp_path / "out", to="safetensors", dequantize=torch.bfloat16)
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert list(got) == ["l.weight"]
    assert torch.equal(got["l.weight"], torch.full((200, 100), 3.0, dtype=torch.bfloat16))


def test_blocks_of_another_size(tmp_path):
    from safetensors.torch import save_file

    scales = torch.arange(1.0, 7.0).reshape(3, 2)
    save_file(
        {"l.weight": torch.ones(12, 7).to(torch.float8_e4m3fn), "l.weight_scale_inv": scales},
        tmp_path / "x.safetensors",
    )
    want = scales.repeat_interleave(5, 0)[:12].repeat_interleave(5, 1)[:, :7]
    ckpt_cloud.convert(
        tmp_path / "x.safetensors", tmp_path / "out.pt", to="torch", dequantize=torch.float32, block_size=5
    )
    assert torch.equal(torch.load(tmp_path / "out.pt")["l.weight"], want)


def test_from_the_shell(state, tmp_path, capsys):
    from typer.testing import CliRunner

    from ckpt_cloud.cli.app import app

    ckpt_cloud.save({"a": torch.ones(3), "step": 1}, checkpoint_id=f"file://{tmp_path}/ours", no_dist=True)
    result = CliRunner().invoke(
        app, ["convert", f"{tmp_path}/ours", f"{tmp_path}/out", "--to", "safetensors", "--json"]
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["left_out"] == ["step"]
    assert "left out" in result.stderr
    assert load_file(tmp_path / "out" / "model.safetensors")["a"].eq(1).all()
