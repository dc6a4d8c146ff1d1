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
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch.distributed import checkpoint as dcp

import ckpt_cloud
from ckpt_cloud.errors import CheckpointPerRank, ChecksumMismatch

HERE = Path(__file__).parent
OF_VERSION = {1: HERE.parent / "data" / "format-v1", 2: HERE.parent / "data" / "format-v2"}
DATA = OF_VERSION[2]
NAMES = ["blocks", "dtypes", "nested", "per-rank", "planner-data", "sharded"]
OF_RANKS = {"per-rank"}
IN_PACKS = {"nested": {"long"}, "plain": {"long"}, "coded": {"long"}, "transformed": {"step"}}
IN_PACKS |= {"encrypted": {"long"}, "coded-encrypted": {"long"}}
"""Items that are not in the manifest."""
CODED = {"coded", "transformed", "coded-encrypted"}
ENCRYPTED = {"encrypted", "coded-encrypted"}
ENCRYPTION_KEY = bytes(range(32))
NOT_FLATTENED = {"planner-data", "plain"}
PUBLIC = Ed25519PrivateKey.from_private_bytes(bytes(range(32))).public_key()
NOTES = {"tuple": (1, ("a", b"\x00\xff")), 7: [None, True, 0.5], ("k", 1): {}}


def keyed(root):
    """For the independent reader: with the key, where one is needed."""
    return independent.Encrypted(root, ENCRYPTION_KEY) if root.parent.name in ENCRYPTED else root


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


def shown(items):
    """{fqn: repr of the value} of what the independent reader found."""
    opened = {
        n: [torch.load(io.BytesIO(v), weights_only=True)] if isinstance(v, bytes) else v for n, v in items.items()
    }
    return {name: repr(value) for name, (value,) in opened.items()}


def shown_in(expected):
    """The same as expected.json has it, which in version 1 knew JSON's values only."""
    return {name: item if isinstance(item, str) else repr(item["value"]) for name, item in expected["items"].items()}


def manifest_of(root):
    return independent.read_manifest(root, independent.read_register(root)["manifest"])


@pytest.fixture(params=OF_VERSION, ids="v{}".format)
def data(request):
    """The frozen checkpoints of one version."""
    return OF_VERSION[request.param]


@pytest.fixture(
    params=[
        pytest.param(path, id=f"{path.parent.name}-{path.name}")
        for where in OF_VERSION.values()
        for path in sorted(where.iterdir())
        if path.name not in OF_RANKS
    ]
)
def frozen(request):
    """A frozen checkpoint of all ranks, and what must be found in it."""
    return keyed(request.param / "checkpoint"), json.loads((request.param / "expected.json").read_text())


def test_nothing_is_missing():
    for version, data in OF_VERSION.items():
        later = ["plain", *CODED, "encrypted"] if version > 1 else []
        assert sorted(path.name for path in data.iterdir()) == sorted([*NAMES, *later])
        registers = [json.loads(path.read_text()) for path in data.rglob("COMMIT")]
        assert {register["version"] for register in registers} == {version}
        assert sum(path.stat().st_size for path in data.rglob("*") if path.is_file()) < 250_000


@pytest.mark.filterwarnings("ignore:ComplexHalf:UserWarning")
def test_ckpt_cloud_loads_it(frozen):
    root, expected = frozen
    root, key = (root.root, root.key) if isinstance(root, independent.Encrypted) else (root, None)
    state = dict.fromkeys(expected["items"])
    for name, tensor in expected["tensors"].items():
        state[name] = torch.empty(tensor["shape"], dtype=getattr(torch, tensor["dtype"]))
    # Planner data that is no flatten mapping belongs to planners that do without one.
    planner = None
    if root.parent.name in NOT_FLATTENED:
        planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    ckpt_cloud.load(state, checkpoint_id=f"file://{root}", planner=planner, encryption_key=key)
    tensors = {name: (t["dtype"], t["shape"], bytes_of(state[name])) for name, t in expected["tensors"].items()}
    assert said(tensors) == expected["tensors"]
    if root.parent.name != "planner-data":
        assert {name: repr(state[name]) for name in expected["items"]} == shown_in(expected)


def test_nested_state_is_put_together(data):
    state = {"model": {"w": torch.empty(4, 3), "b": torch.empty(3, dtype=torch.bfloat16)}, "step": 0}
    state["list"] = [{"m": torch.empty(2, 2)}, 0, [0.0, ""]]
    ckpt_cloud.load(state, checkpoint_id=data / "nested" / "checkpoint")
    assert torch.equal(state["model"]["w"], torch.arange(12.0).view(3, 4).t())
    assert state["list"][1:] == [7, [1.5, "deep"]]
    assert state["step"] == 1234


def test_independent_reader_loads_it(frozen):
    root, expected = frozen
    tensors, items, _ = independent.read(root)
    assert said(tensors) == expected["tensors"]
    assert shown(items) == shown_in(expected)


def test_independent_reader_reads_one_tensor(frozen):
    """Of version 2: by the root, a page of tensors and the pages of the objects that are needed."""
    root, expected = frozen
    if not (root / "..").resolve().is_relative_to(OF_VERSION[2]):
        pytest.skip("version 1 has no pages")
    for name in expected["tensors"]:
        assert said({name: independent.read_tensor(root, name)})[name] == expected["tensors"][name]
    for name in ("", "no such tensor", "~"):
        assert independent.read_tensor(root, name) is None


def test_packs_alone_hold_what_is_stored(frozen):
    root, expected = frozen
    packs = sorted((root / "").rglob("*.safetensors"))
    if isinstance(root, independent.Encrypted):
        packs = [independent.whole(root, path.relative_to(root.root).as_posix()) for path in packs]
    tensors, items = independent.recover(packs)
    assert said(tensors) == {n: t for n, t in expected["tensors"].items() if 0 not in t["shape"]}
    assert set(items) == IN_PACKS.get((root / "..").resolve().name, set())
    assert shown(items).items() <= shown_in(expected).items()


def test_planner_data(data):
    _, _, notes = independent.read(data / "planner-data" / "checkpoint")
    assert notes == NOTES
    reader = ckpt_cloud.ObjectStoreReader(data / "planner-data" / "checkpoint")
    assert reader.read_metadata().planner_data == NOTES
    _, _, paths = independent.read(data / "nested" / "checkpoint")
    assert paths["list.0.m"] == ("list", 0, "m")


@pytest.mark.parametrize("rank", [0, 1])
def test_checkpoints_of_ranks(data, rank):
    """Each rank's own items and chunks, in a checkpoint of its own; none above them."""
    root = data / "per-rank" / "checkpoint"
    own = root / f"rank-{rank:05d}"
    expected = json.loads((data / "per-rank" / "expected.json").read_text())
    with pytest.raises(CheckpointPerRank):
        ckpt_cloud.ObjectStoreReader(root).read_metadata()
    metadata = ckpt_cloud.ObjectStoreReader(root).read_metadata(rank=rank)
    assert [tuple(c.sizes) for c in metadata.state_dict_metadata["rows"].chunks] == [(3 - rank, 3)]
    state = ckpt_cloud.open(own)
    assert said({"replica": ("float32", (6,), bytes_of(state["replica"]))}) == expected["tensors"]
    assert repr(state["epoch"]) == shown_in(expected)["epoch"]
    # A tensor of which another rank has the rest is not one that a reader may return.
    with pytest.raises(independent.Damaged, match="cover"):
        independent.read(own)
    packs = [independent.read_object(own, *entry) for entry in manifest_of(own)["objects"]]
    found = {fqn: data for pack in packs for fqn, _, _, _, _, data, _ in independent.read_pack(pack)}
    assert found["replica"] == bytes_of(state["replica"])


def test_the_samples_hold_the_hard_cases(data):
    (blocks,) = manifest_of(data / "blocks" / "checkpoint")["objects"]
    assert len(blocks[3]) // 4 == 7
    sharded = manifest_of(data / "sharded" / "checkpoint")["tensors"]
    assert [len(entry[2]) for entry in sharded.values()] == [2, 2, 2, 2, 1]
    assert sharded["one"][2][1] == [[1, 0], [0, 4], -1, 0]
    assert manifest_of(data / "nested" / "checkpoint")["items"]["long"][0] is None


def manifest_key_of(name):
    return json.loads((DATA / name / "checkpoint" / "COMMIT").read_text())["manifest"]["key"]


def object_name(name):
    return b"ckpt-cloud sealed object 1\n" + manifest_key_of(name).encode()


def test_an_encrypted_sample_without_the_key_or_with_another():
    root = DATA / "encrypted" / "checkpoint"
    with pytest.raises(independent.Damaged, match="no key"):
        independent.read(root)
    with pytest.raises(independent.Damaged, match="another key"):
        independent.read(independent.Encrypted(root, bytes(32)))


@pytest.mark.parametrize("block", range(2))
def test_the_independent_reader_finds_a_changed_block(tmp_path, block):
    root = shutil.copytree(DATA / "encrypted" / "checkpoint", tmp_path / "copy")
    (pack,) = root.rglob("*.safetensors")
    content = bytearray(pack.read_bytes())
    content[block * 65564 + 20] ^= 1
    pack.write_bytes(content)
    with pytest.raises(independent.Damaged, match=f"block {block} of"):
        independent.read(independent.Encrypted(root, ENCRYPTION_KEY))


def pages_of(name):
    """How many pages of each kind a sample of version 2 has."""
    (path,) = (DATA / name).rglob("manifest")
    reference = independent.read_register(DATA / name / "checkpoint")["manifest"]
    manifest = independent.read_root(path.read_bytes(), reference)
    return [len(manifest[kind]) for kind in ("objects", "tensors", "items", "paths")]


def test_some_have_several_pages_of_a_kind():
    assert pages_of("planner-data") == [1, 1, 1, 0]
    objects, tensors, *_ = pages_of("sharded")
    assert min(objects, tensors) > 1
    assert pages_of("nested")[3] > 1
    assert pages_of("plain")[2] > 3


def test_plain_values_lie_in_the_manifest_and_others_do_not():
    items = manifest_of(DATA / "plain" / "checkpoint")["items"]
    assert {name for name, entry in items.items() if entry[4] is None} == {"huge", "complex", "set", "long"}
    assert items["long"][0] is None
    assert items["none"][4] == [None]


def test_what_is_coded_and_what_is_not():
    register = independent.read_register(DATA / "coded" / "checkpoint")
    assert register["flags"] == ["coded-chunks"]
    manifest = manifest_of(DATA / "coded" / "checkpoint")
    coded = {
        name: chunk[4] for name, (_, _, chunks, _) in manifest["tensors"].items() for chunk in chunks[:1] if chunk[4:]
    }
    assert set(coded) == {"zeros", "mixed", "random", "complex"}
    assert {tuple(each[0]) for each in coded.values()} == {("zstd",)}
    assert len(coded["mixed"][3]) > 1
    assert coded["random"][2][:4] == (4096).to_bytes(4, "little")
    assert manifest["items"]["long"][5][0] == ["zstd"]
    manifest = manifest_of(DATA / "transformed" / "checkpoint")
    assert all(
        chunks[0][4][:3] == [["stream.zstd/1"], 0, b""]
        for _, _, chunks, _ in manifest["tensors"].values()
        if chunks[0][4:]
    )
    assert manifest["items"]["step"][5][0] == ["stream.zstd/1"]
    for data in OF_VERSION.values():
        for path in data.rglob("COMMIT"):
            flags = {"coded-chunks": CODED, "encrypted": ENCRYPTED}
            expected = [flag for flag, names in flags.items() if path.parents[1].name in names]
            assert json.loads(path.read_text())["flags"] == expected


def test_what_is_coded_is_sealed_too():
    """In objects of their own: every one opens with the key, and what is in it is coded as the manifest says."""
    root = keyed(DATA / "coded-encrypted" / "checkpoint")
    manifest = manifest_of(root)
    (chunk,) = manifest["tensors"]["mixed"][2]
    assert chunk[4][0] == ["zstd"]
    assert len(chunk[4][3]) > 1
    sizes = {key: size for key, size, *_ in manifest["objects"]}
    assert len(sizes) > 2
    for key, size in sizes.items():
        assert (root / key).stat().st_size == size + 28
    PUBLIC.verify(
        bytes.fromhex(independent.read_register(root)["signature"]["value"]),
        independent.signed_message(independent.read_register(root)),
    )
    assert ckpt_cloud.verify(root.root, deep=True, trusted_keys=PUBLIC, encryption_key=ENCRYPTION_KEY).ok


def test_what_is_signed_and_noted():
    """The bytes that section 9 names, by hand; the digests, which the independent reader checks; the notes."""
    root = DATA / "plain" / "checkpoint"
    register = independent.read_register(root)
    manifest = manifest_of(root)
    assert register["metrics"] == {"loss": 0.25}
    assert manifest["user_metadata"] == {"commit": "0123abc", "tags": ["x", 1]}
    assert all(entry[5] for entry in manifest["objects"])
    value = bytes.fromhex(register["signature"]["value"])
    message = independent.signed_message(register)
    PUBLIC.verify(value, message)
    with pytest.raises(InvalidSignature):
        PUBLIC.verify(value, message[:-1])
    assert ckpt_cloud.verify(root, deep=True, trusted_keys=PUBLIC).ok


@pytest.mark.parametrize("block", range(7))
def test_a_flipped_bit_in_any_block_is_found(tmp_path, data, block):
    root = shutil.copytree(data / "blocks" / "checkpoint", tmp_path / "copy")
    (pack,) = root.rglob("*.safetensors")
    found = bytearray(pack.read_bytes())
    found[min(block * 4096 + 2000, len(found) - 1)] ^= 0x10
    pack.write_bytes(found)
    with pytest.raises(independent.Damaged, match="checksums"):
        independent.read(root)
    state = {"a": torch.empty(70, 50), "b": torch.empty(5000, dtype=torch.uint8)}
    state["c"] = torch.empty(300, 3, dtype=torch.complex64)
    with pytest.raises(ChecksumMismatch):
        ckpt_cloud.load(state, checkpoint_id=root)


def test_the_independent_reader_finds_damage_in_any_part_of_a_manifest(tmp_path):
    root = shutil.copytree(DATA / "planner-data" / "checkpoint", tmp_path / "copy")
    (path,) = root.rglob("manifest")
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(independent.Damaged):
            manifest_of(root)


def test_the_page_shows_what_is_stored():
    """docs/format.md: its register, its bytes of a manifest, its header of a pack."""
    page = (HERE.parents[1] / "docs" / "format.md").read_text()
    assert f"```json\n{(DATA / 'sharded' / 'checkpoint' / 'COMMIT').read_text()}```" in page
    note = json.loads((DATA / "encrypted" / "checkpoint" / "COMMIT").read_text())["encryption"]
    assert f'"encryption": {json.dumps(note)}' in page
    sealed = (DATA / "encrypted" / "checkpoint" / manifest_key_of("encrypted")).read_bytes()
    for name, part in (("nonce", sealed[:12]), ("tag", sealed[-16:])):
        assert f"{part.hex(' ')}  {name}" in page
    first = bytes.fromhex(re.search(r"((?: ?[0-9a-f]{2})+) +first bytes of the ciphertext", page)[1])
    assert sealed[12:].startswith(first)
    key = independent.derived(ENCRYPTION_KEY, object_name("encrypted")).hex()
    assert f"{key[:32]} {key[32:]}" in page
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
    shown = json.loads(re.sub(r"<(.*?)>", r'"\1"', re.search(r'^"mixed": (.*)$', page, re.MULTILINE)[1]))
    shown[2][0][4][2] = b"".join(int(n).to_bytes(4, "little") for n in shown[2][0][4][2].split())
    assert manifest_of(DATA / "coded" / "checkpoint")["tensors"]["mixed"] == shown


def test_the_independent_reader_is_independent():
    imports = {
        name.name.split(".")[0] if isinstance(node, ast.Import) else node.module.split(".")[0]
        for node in ast.walk(ast.parse((HERE / "independent_reader.py").read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in node.names
    }
    imports -= {"hashlib", "hmac", "itertools", "json", "math", "pathlib", "re"}
    assert imports == {"cryptography", "msgspec", "zstandard"}
    assert independent.crc32c(b"123456789") == 0xE3069283
