"""What was written once stays readable: by ckpt_cloud, and by a reader that knows only docs/format.md."""

import ast
import hashlib
import importlib.util
import io
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

import ckpt_cloud
from ckpt_cloud.errors import CheckpointPerRank, ChecksumMismatch

HERE = Path(__file__).parent
DATA = HERE.parent / "data" / "format-v1"
NAMES = sorted(path.name for path in DATA.iterdir())
OF_RANKS = {"per-rank"}
NOTES = {"tuple": (1, ("a", b"\x00\xff")), 7: [None, True, 0.5], ("k", 1): {}}


def load_module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


independent = load_module(HERE / "independent_reader.py")


def bytes_of(tensor):
    flat = torch.empty(0, dtype=torch.uint8)
    flat.set_(tensor.untyped_storage(), tensor.storage_offset() * tensor.itemsize, (tensor.nbytes,), (1,))
    return flat.numpy().tobytes()


def said(tensors):
    """{fqn: (dtype, shape, bytes)} in the words of expected.json."""
    return {
        name: {"dtype": dtype, "shape": list(shape), "sha256": hashlib.sha256(data).hexdigest()}
        for name, (dtype, shape, data) in tensors.items()
    }


def hashed(items):
    return {name: hashlib.sha256(value).hexdigest() for name, value in items.items()}


def manifest_of(root):
    return independent.read_manifest(root, independent.read_register(root)["manifest"])


@pytest.fixture(params=[name for name in NAMES if name not in OF_RANKS])
def frozen(request):
    """A frozen checkpoint of all ranks, and what must be found in it."""
    where = DATA / request.param
    return where / "checkpoint", json.loads((where / "expected.json").read_text())


def test_nothing_is_missing():
    assert NAMES == ["blocks", "dtypes", "nested", "per-rank", "planner-data", "sharded"]
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file()) < 200_000


@pytest.mark.filterwarnings("ignore:ComplexHalf:UserWarning")
def test_ckpt_cloud_loads_it(frozen):
    root, expected = frozen
    state = dict.fromkeys(expected["items"])
    for name, tensor in expected["tensors"].items():
        state[name] = torch.empty(tensor["shape"], dtype=getattr(torch, tensor["dtype"]))
    # Planner data that is no flatten mapping belongs to planners that do without one.
    planner = None
    if root.parent.name == "planner-data":
        planner = torch.distributed.checkpoint.DefaultLoadPlanner(flatten_state_dict=False)
    ckpt_cloud.load(state, checkpoint_id=f"file://{root}", planner=planner)
    tensors = {name: (t["dtype"], t["shape"], bytes_of(state[name])) for name, t in expected["tensors"].items()}
    assert said(tensors) == expected["tensors"]
    if planner is None:
        assert {name: state[name] for name in expected["items"]} == {
            n: i["value"] for n, i in expected["items"].items()
        }


def test_nested_state_is_put_together():
    state = {"model": {"w": torch.empty(4, 3), "b": torch.empty(3, dtype=torch.bfloat16)}, "step": 0}
    state["list"] = [{"m": torch.empty(2, 2)}, 0, [0.0, ""]]
    ckpt_cloud.load(state, checkpoint_id=DATA / "nested" / "checkpoint")
    assert torch.equal(state["model"]["w"], torch.arange(12.0).view(3, 4).t())
    assert state["list"][1:] == [7, [1.5, "deep"]]
    assert state["step"] == 1234


def test_independent_reader_loads_it(frozen):
    root, expected = frozen
    tensors, items, _ = independent.read(root)
    assert said(tensors) == expected["tensors"]
    assert hashed(items) == {name: item["sha256"] for name, item in expected["items"].items()}
    opened = {name: torch.load(io.BytesIO(value), weights_only=True) for name, value in items.items()}
    assert opened == {name: item["value"] for name, item in expected["items"].items()}


def test_packs_alone_hold_what_is_stored(frozen):
    root, expected = frozen
    tensors, items = independent.recover(sorted(root.rglob("*.safetensors")))
    assert said(tensors) == {n: t for n, t in expected["tensors"].items() if 0 not in t["shape"]}
    assert set(items) == ({"long"} if root.parent.name == "nested" else set())
    assert hashed(items).items() <= {name: item["sha256"] for name, item in expected["items"].items()}.items()


def test_planner_data():
    _, _, notes = independent.read(DATA / "planner-data" / "checkpoint")
    assert notes == NOTES
    reader = ckpt_cloud.ObjectStoreReader(DATA / "planner-data" / "checkpoint")
    assert reader.read_metadata().planner_data == NOTES
    _, _, paths = independent.read(DATA / "nested" / "checkpoint")
    assert paths["list.0.m"] == ("list", 0, "m")


@pytest.mark.parametrize("rank", [0, 1])
def test_checkpoints_of_ranks(rank):
    """Each rank's own items and chunks, in a checkpoint of its own; none above them."""
    root = DATA / "per-rank" / "checkpoint"
    own = root / f"rank-{rank:05d}"
    expected = json.loads((DATA / "per-rank" / "expected.json").read_text())
    with pytest.raises(CheckpointPerRank):
        ckpt_cloud.ObjectStoreReader(root).read_metadata()
    metadata = ckpt_cloud.ObjectStoreReader(root).read_metadata(rank=rank)
    assert [tuple(c.sizes) for c in metadata.state_dict_metadata["rows"].chunks] == [(3 - rank, 3)]
    state = {"replica": torch.empty(6), "epoch": None}
    ckpt_cloud.load(state, checkpoint_id=own)
    assert said({"replica": ("float32", (6,), bytes_of(state["replica"]))}) == expected["tensors"]
    assert state["epoch"] == expected["items"]["epoch"]["value"]
    # A tensor of which another rank has the rest is not one that a reader may return.
    with pytest.raises(independent.Damaged, match="cover"):
        independent.read(own)
    packs = [independent.read_object(own, *entry[:4]) for entry in manifest_of(own)["objects"]]
    found = {fqn: data for pack in packs for fqn, _, _, _, _, data in independent.read_pack(pack)}
    assert found["replica"] == bytes_of(state["replica"])


def test_the_samples_hold_the_hard_cases():
    (blocks,) = manifest_of(DATA / "blocks" / "checkpoint")["objects"]
    assert len(blocks[3]) // 4 == 7
    sharded = manifest_of(DATA / "sharded" / "checkpoint")["tensors"]
    assert [len(entry[2]) for entry in sharded.values()] == [2, 2, 2, 2, 1]
    assert sharded["one"][2][1] == [[1, 0], [0, 4], -1, 0]
    assert manifest_of(DATA / "nested" / "checkpoint")["items"]["long"][0] is None


@pytest.mark.parametrize("block", range(7))
def test_a_flipped_bit_in_any_block_is_found(tmp_path, block):
    root = shutil.copytree(DATA / "blocks" / "checkpoint", tmp_path / "copy")
    (pack,) = root.rglob("*.safetensors")
    data = bytearray(pack.read_bytes())
    data[min(block * 4096 + 2000, len(data) - 1)] ^= 0x10
    pack.write_bytes(data)
    with pytest.raises(independent.Damaged, match="checksums"):
        independent.read(root)
    state = {"a": torch.empty(70, 50), "b": torch.empty(5000, dtype=torch.uint8)}
    state["c"] = torch.empty(300, 3, dtype=torch.complex64)
    with pytest.raises(ChecksumMismatch):
        ckpt_cloud.load(state, checkpoint_id=root)


def test_the_page_shows_what_is_stored():
    """docs/format.md: its register, its bytes of a manifest, its header of a pack."""
    page = (HERE.parents[1] / "docs" / "format.md").read_text()
    assert f"```json\n{(DATA / 'sharded' / 'checkpoint' / 'COMMIT').read_text()}```" in page
    (manifest,) = (DATA / "planner-data").rglob("manifest")
    data = manifest.read_bytes()
    rows = re.search(r"```hex\n(.*?)```", page, re.DOTALL)[1].splitlines()
    assert len(rows) > 10
    for row in rows:
        at, shown = int(row[:3], 16), bytes.fromhex(re.match(r"(?: +[0-9a-f]{2}\b)+", row[3:])[0])
        assert data[at : at + len(shown)] == shown, row
    (pack,) = (DATA / "planner-data").rglob("*.safetensors")
    assert pack.read_bytes()[8:152].decode().strip() in page
    for row in re.findall(r'^"(?:rows|one)": .*$', page, re.MULTILINE):
        ((name, shown),) = json.loads(f"{{{row}}}").items()
        assert manifest_of(DATA / "sharded" / "checkpoint")["tensors"][name] == shown


def test_the_independent_reader_is_independent():
    imports = {
        name.name.split(".")[0] if isinstance(node, ast.Import) else node.module.split(".")[0]
        for node in ast.walk(ast.parse((HERE / "independent_reader.py").read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in node.names
    }
    assert imports == {"hashlib", "itertools", "json", "math", "msgspec", "pathlib", "re"}
    assert independent.crc32c(b"123456789") == 0xE3069283
