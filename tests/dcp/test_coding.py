"""Compression and stream transforms: what goes in comes out, parts by their frames, what is missing is named."""

import io
import json
import pickle
import secrets
import sys
from datetime import timedelta

import calls
import pytest
import ranks
import torch
from msgspec import structs
from safetensors.torch import load_file
from test_roundtrip import PLAIN, bits, emptied, random_bits
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint._extension import ExtensionRegistry, StreamTransformExtension, ZStandard

import ckpt_cloud
from ckpt_cloud import CommitOptions, ObjectStoreReader, ObjectStoreWriter, StoreOptions, TransferOptions, bridge
from ckpt_cloud.errors import (
    ChecksumMismatch,
    CorruptManifest,
    InvalidOption,
    StoreUnavailable,
    Unsupported,
)
from ckpt_cloud.format import manifest as manifests
from ckpt_cloud.format import register as registers
from ckpt_cloud.format.checksum import BlockSums
from ckpt_cloud.stores import open_store, parse_url
from ckpt_cloud.testing import Crashed, Faults
from ckpt_cloud.transfer import encode
from tests import forge

SMALL = TransferOptions(frame_size=4096, block_size=4096, inline_limit=2000)
MIB = 1 << 20
FLIPPED = bytes(byte ^ 0xFF for byte in range(256))


class Flip(StreamTransformExtension):
    """A transform that only its registry knows."""

    @staticmethod
    def registry_name():
        return "test.flip"

    @staticmethod
    def from_descriptor(version):
        return Flip()

    def get_descriptor(self):
        return "test.flip/1"

    def transform_to(self, output):
        class Writer(io.RawIOBase):
            def write(self, data):
                output.write(bytes(data).translate(FLIPPED))
                return len(data)

            def close(self):
                if not self.closed:
                    output.close()
                super().close()

        return Writer()

    def transform_from(self, input):  # noqa: A002 - DCP's signature
        return io.BytesIO(input.read().translate(FLIPPED))


def registry():
    known = ExtensionRegistry()
    known.register(Flip)
    return known


KINDS = {
    "zstd": {"compression": "zstd"},
    "stream": {"extensions": [ZStandard()]},
    "two streams": {"extensions": [ZStandard(), Flip()]},
}


@pytest.fixture(params=KINDS)
def how(request):
    return KINDS[request.param]


@pytest.fixture
def here():
    return f"memory://{secrets.token_hex(4)}/run"


def make_state():
    torch.manual_seed(3)
    mixed = torch.zeros(300, 200)
    mixed[100:200] = torch.randn(100, 200)
    return {
        "zeros": torch.zeros(500, 100, dtype=torch.float64),
        "mixed": mixed,
        "turned": torch.randn(90, 170).t(),
        "bf16": torch.randn(129, 77).to(torch.bfloat16),
        "nested": {"list": [torch.arange(5000), 7, "text"]},
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 3),
        "large item": "0123456789" * 500,
        "no plain value": {2j},
        "step": 5,
    }


def same(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and bits(one) == bits(other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def save(state, url, **options):
    writer = ObjectStoreWriter(url, **{"transfer": SMALL, **options})
    ckpt_cloud.save(state, storage_writer=writer)
    return writer.report


def load(state, url, **options):
    got = emptied(state)
    reader = ObjectStoreReader(url, extensions=registry(), **options)
    ckpt_cloud.load(got, storage_reader=reader)
    return got, reader.report


def test_what_goes_in_comes_out(url, how):
    """On every kind of store."""
    state = make_state()
    save(state, url, **how)
    assert same(load(state, url)[0], state)
    assert ckpt_cloud.verify(url, deep=True).ok


@pytest.mark.servers
def test_on_seaweedfs(seaweedfs, monkeypatch, how):
    for name, value in seaweedfs.env.items():
        monkeypatch.setenv(name, value)
    bucket = f"bucket-{secrets.token_hex(4)}"
    seaweedfs.create_bucket(bucket)
    state = {**make_state(), "large": torch.arange(3_000_000)}
    save(state, f"s3://{bucket}/run", **how)
    assert same(load(state, f"s3://{bucket}/run")[0], state)


@pytest.mark.filterwarnings("ignore:ComplexHalf:UserWarning")
@pytest.mark.parametrize("contiguous", [True, False])
def test_every_dtype(here, how, contiguous):
    state = {}
    for dtype in PLAIN:
        state[str(dtype)] = random_bits(dtype, (70, 90))
        state[f"{dtype} zeros"] = random_bits(dtype, (1, 1)).expand(70, 90).clone()
    state |= {f"{dtype} scalar": random_bits(dtype, ()) for dtype in PLAIN}
    if not contiguous:
        state = {name: value.t() if value.dim() else value for name, value in state.items()}
    save(state, here, **how)
    loaded = load(state, here)[0]
    assert [name for name in state if bits(loaded[name]) != bits(state[name])] == []


def test_chunks_over_several_objects(here, how, monkeypatch):
    monkeypatch.setattr(encode, "PACK_BYTES", 50_000)
    monkeypatch.setattr(encode, "UNIT_BYTES", 8192)
    monkeypatch.setattr(encode, "_PIECE", 10_000)
    state = {"w": torch.randn(400, 300), "v": torch.randn(50, 50)}
    report = save(state, here, **how)
    assert report.objects > 3
    assert same(load(state, here)[0], state)
    assert ckpt_cloud.verify(here, deep=True).ok
    with ckpt_cloud.open(here, extensions=registry(), keys=["w"]) as opened:
        assert torch.equal(opened.get_slice("w")[101:207, 13:99], state["w"][101:207, 13:99])


@pytest.mark.parametrize("small", [{"memory_budget": 10 * MIB, "part_size": 5 * MIB, "range_size": 5 * MIB}])
def test_with_the_least_memory(here, how, small):
    transfer = TransferOptions(pack_size=5 * MIB, frame_size=4 * MIB, **small)
    state = {"w": torch.randint(0, 255, (3000, 5000), dtype=torch.uint8), "v": torch.zeros(3_000_000)}
    save(state, here, **{**how, "transfer": transfer})
    assert same(load(state, here, transfer=transfer)[0], state)


class TestFigures:
    def test_less_is_moved_than_is_needed(self, here):
        state = {"w": torch.zeros(1000, 1000), "v": torch.arange(500_000)}
        saved = save(state, here, compression="zstd", transfer=TransferOptions())
        assert saved.bytes_needed == 8_000_000
        assert saved.bytes_moved < 0.3 * saved.bytes_needed
        loaded = load(state, here)[1]
        assert loaded.bytes_needed == 8_000_000
        assert loaded.bytes_moved <= saved.bytes_moved

    def test_a_part_of_a_tensor_fetches_its_frames(self, here):
        """4 MiB in frames of 4 KiB that do not compress: ten rows of 4,000 bytes are at most 11 frames, in blocks."""
        whole = torch.randint(0, 256, (1024, 4096), dtype=torch.uint8)
        save({"w": whole}, here, compression="zstd")
        with ckpt_cloud.open(here) as opened:
            assert torch.equal(opened.get_slice("w")[500:510], whole[500:510])
            assert 10 * 4096 <= opened.report.bytes_moved <= 13 * 4096
            assert opened.report.bytes_needed == 10 * 4096

    def test_a_stream_is_fetched_whole(self, here):
        whole = torch.randint(0, 256, (1024, 4096), dtype=torch.uint8)
        save({"w": whole}, here, extensions=[ZStandard()])
        with ckpt_cloud.open(here) as opened:
            assert torch.equal(opened.get_slice("w")[500:510], whole[500:510])
            assert opened.report.bytes_moved > whole.nbytes

    def test_small_chunks_and_uncompressed_saves_are_as_ever(self, tmp_path):
        """Nothing coded, so that any reader may read it; and a pack of small tensors opens with safetensors alone."""
        state = {"s": torch.tensor(1.5), "v": torch.arange(100), "step": 5}
        save(state, tmp_path / "run", compression="zstd")
        assert json.loads((tmp_path / "run/COMMIT").read_text())["flags"] == []
        (pack,) = (tmp_path / "run/data").rglob("*.safetensors")
        assert torch.equal(load_file(pack)["v"], state["v"])

    def test_packs_are_safetensors(self, tmp_path, how):
        save(make_state(), tmp_path / "run", **how)
        assert json.loads((tmp_path / "run/COMMIT").read_text())["flags"] == ["coded-chunks"]
        for pack in (tmp_path / "run/data").rglob("*.safetensors"):
            assert load_file(pack)

    def test_nothing_of_what_is_transformed_is_in_the_clear(self, tmp_path):
        secret = "a phrase that nobody may read"
        save({"item": secret, "n": 77_777_777, "w": torch.full((900,), 0x5A5A5A5A)}, tmp_path, extensions=[Flip()])
        stored = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
        assert secret.encode() not in stored
        assert b"\x5a" * 50 not in stored
        assert load({"item": None, "n": 0, "w": torch.zeros(900).long()}, tmp_path)[0]["item"] == secret


class TestRefused:
    def test_a_transform_that_is_missing_is_named_and_nothing_changed(self, here):
        save({"a": torch.ones(9000), "w": torch.ones(9000), "item": {1j}}, here, extensions=[Flip()])
        state = {"a": torch.zeros(9000), "w": torch.zeros(9000), "item": None}
        with pytest.raises(Unsupported, match=r"test\.flip/1") as refused:
            ckpt_cloud.load(state, checkpoint_id=here)
        assert "extensions=registry" in refused.value.hint
        assert state["a"].sum() == 0
        with ckpt_cloud.open(here) as opened, pytest.raises(Unsupported, match=r"'w'.*test\.flip/1"):
            opened["w"]
        with ckpt_cloud.open(here, extensions=registry()) as opened:
            assert opened["w"].sum() == 9000
            assert opened["item"] == {1j}

    def test_without_the_library(self, here, monkeypatch):
        save({"w": torch.ones(9000)}, here, compression="zstd")
        monkeypatch.setitem(sys.modules, "zstandard", None)
        with pytest.raises(Unsupported, match="'w' is compressed by 'zstd'") as refused:
            ckpt_cloud.load({"w": torch.zeros(9000)}, checkpoint_id=here)
        assert "ckpt-cloud[zstd]" in refused.value.hint
        for make in (
            lambda: ObjectStoreWriter(here, compression="zstd"),
            lambda: ObjectStoreWriter(here, transfer=TransferOptions(compression="zstd")),
            lambda: ckpt_cloud.save({}, checkpoint_id=here, compression="zstd"),
            lambda: ckpt_cloud.CheckpointManager(here, compression="zstd"),
        ):
            with pytest.raises(InvalidOption, match="zstandard"):
                make()
        # Checking needs none.
        assert ckpt_cloud.verify(here, deep=True).ok

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"compression": "lz4"}, "'lz4'"),
            ({"compression": "zstd", "extensions": [ZStandard()]}, "exclude"),
            ({"extensions": ["zstd"]}, "extensions has a str"),
        ],
    )
    def test_options(self, here, options, said):
        with pytest.raises(InvalidOption, match=said):
            ObjectStoreWriter(here, **options)

    @pytest.mark.parametrize(
        "options",
        [{"compression": "gzip"}, {"compression_level": 23}, {"frame_size": 5000}, {"frame_size": 8 * MIB}],
        ids=str,
    )
    def test_transfer_options(self, options):
        with pytest.raises(InvalidOption, match=next(iter(options))):
            TransferOptions(**options)

    def test_compression_beside_a_writer(self, here):
        for call in (ckpt_cloud.save, ckpt_cloud.async_save):
            with pytest.raises(InvalidOption, match="another was given"):
                call({}, storage_writer=ObjectStoreWriter(here), compression="zstd")


class TestEverythingElse:
    """Works on coded checkpoints too."""

    def test_save_and_async_save_by_keyword(self, tmp_path):
        state = {"w": torch.zeros(9000)}
        ckpt_cloud.save(state, checkpoint_id=tmp_path / "1", compression="zstd")
        ckpt_cloud.async_save(state, checkpoint_id=tmp_path / "2", compression="zstd").result()
        with ckpt_cloud.CheckpointManager(tmp_path / "run", compression="zstd") as manager:
            manager.save(3, state)
        for where in ("1", "2", "run/step-3"):
            assert json.loads((tmp_path / where / "COMMIT").read_text())["flags"] == ["coded-chunks"]
            assert same(load(state, tmp_path / where)[0], state)

    def test_dcps_own_calls(self, here):
        state = make_state()
        dcp.save(state, storage_writer=ObjectStoreWriter(here, compression="zstd"))
        got = emptied(state)
        dcp.load(got, storage_reader=ObjectStoreReader(here))
        assert same(got, state)

    def test_copied(self, tmp_path, how):
        state = make_state()
        save(state, tmp_path / "run", **how)
        ckpt_cloud.copy(tmp_path / "run", tmp_path / "copy", read_back=True)
        assert json.loads((tmp_path / "copy/COMMIT").read_text())["flags"] == ["coded-chunks"]
        assert same(load(state, tmp_path / "copy")[0], state)

    def test_collected(self, tmp_path, how):
        state = make_state()
        save(state, tmp_path / "root/run", **how)
        before = sorted(path for path in (tmp_path / "root").rglob("*") if path.is_file())
        save(state, tmp_path / "root/run", overwrite=True, **how)
        ckpt_cloud.gc(tmp_path / "root", older_than=timedelta(0))
        after = sorted(path for path in (tmp_path / "root").rglob("*") if path.is_file())
        assert set(before) & set(after) == {tmp_path / "root/run/COMMIT"}
        assert same(load(state, tmp_path / "root/run")[0], state)

    def test_signed(self, tmp_path, how):
        ed25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519")
        key = ed25519.Ed25519PrivateKey.generate()
        state = make_state()
        save(state, tmp_path, sign=key, **how)
        trusted = key.public_key()
        assert same(load(state, tmp_path, trusted_keys=trusted)[0], state)
        assert ckpt_cloud.verify(tmp_path, deep=True, trusted_keys=trusted).ok

    @pytest.mark.parametrize("to", ["ckpt-cloud", "dcp", "safetensors", "torch"])
    def test_converted(self, tmp_path, how, to):
        state = {"w": torch.randn(300, 100), "v": torch.zeros(5000)}
        save(state, tmp_path / "run", **how)
        target = tmp_path / ("file.pt" if to == "torch" else "other")
        ckpt_cloud.convert(tmp_path / "run", target, to=to, extensions=registry())
        got = emptied(state)
        ckpt_cloud.load(got, checkpoint_id=target)
        assert same(got, state)

    def test_converted_to_a_compressed_one(self, tmp_path):
        state = {"w": torch.zeros(90_000), "v": torch.arange(5000)}
        ckpt_cloud.save(state, checkpoint_id=tmp_path / "run")
        transfer = TransferOptions(compression="zstd")
        done = ckpt_cloud.convert(tmp_path / "run", tmp_path / "smaller", to="ckpt-cloud", transfer=transfer)
        assert done.bytes_written < done.bytes_read / 5
        assert same(load(state, tmp_path / "smaller")[0], state)

    def test_a_pickled_writer(self, here, how):
        writer = pickle.loads(pickle.dumps(ObjectStoreWriter(here, transfer=SMALL, **how)))
        state = make_state()
        ckpt_cloud.save(state, storage_writer=writer)
        assert same(load(state, here)[0], state)

    def test_a_shard_that_is_loaded_by_others(self, tmp_path):
        assert ranks.run(3, calls.coded_shards, tmp_path, f"file://{tmp_path}/run") == [[]] * 3
        with ckpt_cloud.open(tmp_path / "run/zstd") as opened:
            assert torch.equal(opened["rows"], torch.arange(500 * 30.0).view(500, 30))

    def test_async_save_in_a_process(self, tmp_path):
        assert ranks.run(2, calls.coded_save_in_a_process, tmp_path, f"file://{tmp_path}/run") == [True] * 2

    def test_a_failed_save_leaves_nothing_and_commits_nothing(self, tmp_path, how, monkeypatch):
        monkeypatch.setattr(encode, "PACK_BYTES", 10_000)
        state = make_state()
        faults = Faults()
        faults.fail("put", "data/*", error=StoreUnavailable, after=2)
        with faults.everywhere(), pytest.raises(StoreUnavailable):
            save(state, tmp_path / "run", **how)
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == []

    def test_a_crash_at_any_request_leaves_the_old_or_the_new(self, here, how, monkeypatch):
        monkeypatch.setattr(encode, "PACK_BYTES", 10_000)
        old, new = {"w": torch.zeros(9000), "v": torch.arange(9000)}, {"w": torch.ones(9000), "v": torch.randn(9000)}
        new["v"] = new["v"].long()
        save(old, here, **how)
        outcomes = []
        for n in range(1, 40):
            faults = Faults()
            faults.crash_at(n)
            try:
                with faults.everywhere():
                    save(new, here, overwrite=True, commit=CommitOptions(deadline_s=0.5), **how)
            except (Crashed, ckpt_cloud.CkptCloudError):
                got = load(old, here)[0]
                assert same(got, old) or same(got, new)
                outcomes.append(same(got, new))
                save(old, here, overwrite=True, **how)
                continue
            break
        assert len(outcomes) >= 3
        assert same(load(new, here)[0], new)


def opened(url):
    store = open_store(parse_url(url), StoreOptions())
    data, _ = bridge.run(store.get("COMMIT", limit=MIB))
    register = registers.decode(data, url)
    manifest, _ = bridge.run(store.get(register.manifest.key, limit=MIB))
    return store, register, forge.opened(manifest)


def rewrite(url, change):
    """Puts a manifest, with digests that fit, in the place of what is there."""
    store, register, manifest = opened(url)
    changed = change(manifest)
    data = manifests.encode(changed)
    bridge.run(store.put(register.manifest.key, data))
    register = structs.replace(register, manifest=manifests.reference(register.manifest.key, data))
    bridge.run(store.put("COMMIT", registers.encode(register)))


def with_coded(name, **fields):
    def change(manifest):
        entry = manifest.tensors[name]
        chunk = entry.chunks[0]
        coded = structs.replace(chunk.coded, **fields)
        entry = structs.replace(entry, chunks=[structs.replace(chunk, coded=coded)])
        return structs.replace(manifest, tensors={**manifest.tensors, name: entry})

    return change


class TestHostile:
    def test_a_flipped_bit_in_a_frame(self, tmp_path, how):
        save({"w": torch.zeros(90_000)}, tmp_path, **how)
        (pack,) = (tmp_path / "data").rglob("*.safetensors")
        data = bytearray(pack.read_bytes())
        data[-5] ^= 1
        pack.write_bytes(data)
        with pytest.raises(ChecksumMismatch, match="w"):
            load({"w": torch.zeros(90_000)}, tmp_path)
        assert not ckpt_cloud.verify(tmp_path, deep=True).ok

    def test_frames_that_were_damaged_before_their_checksums_were_taken(self, tmp_path, how):
        """Whoever wrote them: an error that names the tensor, never other values."""
        state = {"v": torch.ones(90_000), "w": torch.arange(90_000)}
        save(state, tmp_path, **how)
        _, _, manifest = opened(tmp_path)
        number, start, nbytes = manifest.tensors["w"].chunks[0].coded.extents[0]
        path = tmp_path / manifest.objects[number].key
        data = bytearray(path.read_bytes())
        for at in range(start, start + nbytes, 50):
            data[at] ^= 0x55
        path.write_bytes(data)
        sums = BlockSums(4096)
        sums.update(data)
        objects = list(manifest.objects)
        objects[number] = structs.replace(objects[number], sums=sums.finish())
        rewrite(tmp_path, lambda found: structs.replace(found, objects=objects))
        with pytest.raises(CorruptManifest, match="'w'"):
            load(state, tmp_path)

    def test_a_codec_that_nobody_knows(self, here):
        save({"w": torch.zeros(90_000)}, here, compression="zstd")
        rewrite(here, with_coded("w", codec=("brotli",)))
        with pytest.raises(Unsupported, match="'w' is compressed by 'brotli'"):
            load({"w": torch.zeros(90_000)}, here)

    @pytest.mark.parametrize(
        "fields",
        [{"frame": 8192}, {"sizes": b""}, {"frame": 0}, {"frame": 1 << 40}, {"extents": ((0, 0, 5),)}],
        ids=str,
    )
    def test_a_manifest_that_contradicts_itself(self, here, fields):
        save({"w": torch.zeros(90_000)}, here, compression="zstd")
        rewrite(here, with_coded("w", **fields))
        with pytest.raises(CorruptManifest):
            load({"w": torch.zeros(90_000)}, here)
        assert not ckpt_cloud.verify(here).ok

    def test_frames_in_another_order(self, here):
        """Each is whole, of the right length, and under checksums that fit; the manifest says where each lies."""
        state = {"w": torch.arange(4096, dtype=torch.int16)}
        save(state, here, compression="zstd")
        _, _, manifest = opened(here)
        coded = manifest.tensors["w"].chunks[0].coded
        (number, start, nbytes) = coded.extents[0]
        first = int.from_bytes(coded.sizes[:4], "little")
        swapped = ((number, start + first, nbytes - first), (number, start, first))
        rewrite(here, with_coded("w", sizes=coded.sizes[4:] + coded.sizes[:4], extents=swapped))
        assert torch.equal(load(state, here)[0]["w"], torch.cat([state["w"][2048:], state["w"][:2048]]))

    def test_an_item_that_claims_more_than_there_is(self, here, how):
        state = {"item": "0123456789" * 500}
        save(state, here, **how)

        def change(manifest):
            item = manifest.items["item"]
            return structs.replace(manifest, items={"item": structs.replace(item, nbytes=1 << 50)})

        rewrite(here, change)
        with pytest.raises(CorruptManifest):
            load(state, here)

    def test_an_unknown_flag_is_refused_by_those_who_do_not_know_it(self, here, monkeypatch):
        save({"w": torch.zeros(90_000)}, here, compression="zstd")
        monkeypatch.setattr(registers, "KNOWN_FLAGS", frozenset())
        with pytest.raises(Unsupported, match="coded-chunks"):
            load({"w": torch.zeros(90_000)}, here)
