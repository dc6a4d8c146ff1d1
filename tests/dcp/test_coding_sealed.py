"""What is compressed or transformed, and encrypted, and signed: as either alone, in one checkpoint."""

import io
import json
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from test_coding import KINDS, SMALL, Flip, make_state, registry, same
from test_roundtrip import emptied

import ckpt_cloud
from ckpt_cloud import ObjectStoreReader, ObjectStoreWriter, TransferOptions
from ckpt_cloud.cli.app import app
from ckpt_cloud.errors import DecryptionFailed, EncryptionKeyMissing, InvalidOption, SignatureError, WrongEncryptionKey
from ckpt_cloud.format.sealing import SEALED_BLOCK, plain_size
from ckpt_cloud.transfer import encode

KEY = bytes(range(7, 39))
OTHER = bytes(range(8, 40))
SIGNER = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
FLAGS = ["coded-chunks", "encrypted"]
MIB = 1 << 20
LEAST = {"memory_budget": 10 * MIB, "part_size": 5 * MIB, "range_size": 5 * MIB, "pack_size": 5 * MIB}


@pytest.fixture(params=KINDS)
def how(request):
    return KINDS[request.param]


def save(state, url, **options):
    writer = ObjectStoreWriter(url, **{"transfer": SMALL, "encryption_key": KEY, **options})
    ckpt_cloud.save(state, storage_writer=writer)
    return writer.report


def load(state, url, **options):
    got = emptied(state)
    reader = ObjectStoreReader(url, **{"extensions": registry(), "encryption_key": KEY, **options})
    ckpt_cloud.load(got, storage_reader=reader)
    return got, reader.report


def flags_of(url):
    return json.loads((Path(url) / "COMMIT").read_text())["flags"]


def packs_of(url):
    return sorted(Path(url).rglob("*.safetensors"))


def test_what_goes_in_comes_out(url, how):
    """On every kind of store, signed as well."""
    state = make_state()
    save(state, url, sign=SIGNER, **how)
    trusted = SIGNER.public_key()
    assert same(load(state, url, trusted_keys=trusted)[0], state)
    assert ckpt_cloud.verify(url, deep=True, encryption_key=KEY, trusted_keys=trusted).ok


@pytest.mark.parametrize("engine", ["native", pytest.param("fsspec", marks=pytest.mark.slow)])
def test_on_s3_in_parts(s3_url, how, engine, monkeypatch):
    """Objects of coded chunks that take several parts, which are as large as S3 wants them."""
    monkeypatch.setattr(encode, "PACK_BYTES", 12 * MIB)
    transfer = TransferOptions(memory_budget=100 * MIB, part_size=5 * MIB)
    state = {"w": torch.randint(0, 255, (15_000, 1000), dtype=torch.uint8), "v": torch.zeros(100_000)}
    url = f"{s3_url}/{engine}"
    save(state, url, transfer=transfer, engine=engine, **how)
    got, report = load(state, url, transfer=transfer, engine=engine)
    assert same(got, state)
    assert report.verified
    ckpt_cloud.copy(url, f"{url}-copy", encryption_key=KEY, transfer=transfer)
    assert same(load(state, f"{url}-copy")[0], state)


class Hoard(Flip):
    """A transform that gives everything at its end, at once."""

    def transform_to(self, output):
        class Writer(io.BytesIO):
            def close(self):
                if not self.closed:
                    output.write(self.getvalue().translate(bytes(byte ^ 0xFF for byte in range(256))))
                    output.close()
                super().close()

        return Writer()


@pytest.mark.parametrize("how", [*KINDS.values(), {"extensions": [Hoard()]}], ids=[*KINDS, "hoard"])
@pytest.mark.parametrize("where", ["file", "s3"])
def test_with_the_least_memory(tmp_path, s3_url, where, how):
    """Parts larger than their share of the memory go up one by one."""
    url = str(tmp_path) if where == "file" else f"{s3_url}/run"
    transfer = TransferOptions(**LEAST, frame_size=4 * MIB)
    state = {"w": torch.randint(0, 255, (6000, 3000), dtype=torch.uint8), "v": torch.zeros(1_000_000)}
    save(state, url, transfer=transfer, **how)
    assert same(load(state, url, transfer=transfer)[0], state)


def test_all_of_it_is_sealed(tmp_path, how, monkeypatch):
    """Packs of coded chunks too: what they say of themselves, and of the tensors in them, is not there to be read."""
    monkeypatch.setattr(encode, "PACK_BYTES", 20_000)
    state = {"MARKEDtensor": torch.full((9000,), 0x5A5A), "MARKEDitem": "MARKED" * 2000, "n": 5}
    report = save(state, tmp_path, **how)
    assert flags_of(tmp_path) == FLAGS
    stored = [path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file()]
    assert len(stored) > 1
    for content in stored:
        assert plain_size(len(content)) is not None
        for word in (b"MARKED", b"zstd", b"ckpt_cloud", b"int64", bytes(6)):
            assert word not in content
    assert report.bytes_moved == sum(path.stat().st_size for path in packs_of(tmp_path))
    assert same(load(state, tmp_path)[0], state)


@pytest.mark.parametrize("encrypted", [True, False])
@pytest.mark.parametrize("how", [*KINDS.values(), {}], ids=[*KINDS, "plain"])
def test_without_verification(tmp_path, how, encrypted):
    """No more is fetched than what is needed; a flipped bit of what is encrypted is found all the same."""
    key = KEY if encrypted else None
    state = make_state()
    save(state, tmp_path, encryption_key=key, **how)
    verified = load(state, tmp_path, encryption_key=key)[1]
    got, report = load(state, tmp_path, encryption_key=key, verify=False)
    assert same(got, state)
    assert (verified.verified, report.verified) == (True, False)
    assert report.bytes_moved <= verified.bytes_moved


def test_a_part_fetches_its_frames(tmp_path):
    """4 MiB in frames of 4 KiB that do not compress; a store is asked for whole sealed blocks below."""
    whole = torch.randint(0, 256, (1024, 4096), dtype=torch.uint8)
    save({"w": whole}, tmp_path, compression="zstd")
    with ckpt_cloud.open(tmp_path, encryption_key=KEY) as opened:
        assert torch.equal(opened.get_slice("w")[500:510], whole[500:510])
        assert 10 * 4096 <= opened.report.bytes_moved <= 13 * 4096


def test_damage_and_wrong_keys(tmp_path, how):
    state = make_state()
    save(state, tmp_path, sign=SIGNER, **how)
    for key, error in ((None, EncryptionKeyMissing), (OTHER, WrongEncryptionKey)):
        with pytest.raises(error):
            load(state, tmp_path, encryption_key=key)
    stranger = Ed25519PrivateKey.generate().public_key()
    with pytest.raises(SignatureError):
        load(state, tmp_path, trusted_keys=stranger)
    largest = max(packs_of(tmp_path), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 8
    largest.write_bytes(content)
    for verify in (True, False):
        with pytest.raises(DecryptionFailed, match="not what was encrypted"):
            load(state, tmp_path, verify=verify)
    (fault,) = ckpt_cloud.verify(tmp_path, deep=True, encryption_key=KEY).faults
    assert fault.start <= len(content) // 2 // SEALED_BLOCK * 65536 < fault.end


def test_copied(tmp_path, how):
    state = make_state()
    save(state, tmp_path / "run", sign=SIGNER, **how)
    trials = {
        "same": ({"encryption_key": KEY}, KEY),
        "rekeyed": ({"source_encryption_key": KEY, "encryption_key": OTHER}, OTHER),
        "clear": ({"source_encryption_key": KEY, "decrypt": True}, None),
    }
    for name, (options, key) in trials.items():
        ckpt_cloud.copy(tmp_path / "run", tmp_path / name, read_back=True, **options)
        assert flags_of(tmp_path / name) == (FLAGS if key else FLAGS[:1])
        assert same(load(state, tmp_path / name, encryption_key=key)[0], state)
    ckpt_cloud.copy(tmp_path / "clear", tmp_path / "sealed", encryption_key=KEY, sign=SIGNER)
    assert flags_of(tmp_path / "sealed") == FLAGS
    assert same(load(state, tmp_path / "sealed", trusted_keys=SIGNER.public_key(), require_signature=True)[0], state)


@pytest.mark.parametrize("to", ["ckpt-cloud", "dcp", "safetensors", "torch"])
def test_converted(tmp_path, how, to):
    state = {"w": torch.randn(300, 100), "v": torch.zeros(5000)}
    save(state, tmp_path / "run", **how)
    target = tmp_path / ("file.pt" if to == "torch" else "other")
    options = {"source_encryption_key": KEY, "extensions": registry(), "decrypt": to != "ckpt-cloud"}
    ckpt_cloud.convert(tmp_path / "run", target, to=to, transfer=TransferOptions(compression="zstd"), **options)
    got = emptied(state)
    ckpt_cloud.load(got, checkpoint_id=target, encryption_key=KEY)
    assert same(got, state)
    if to == "ckpt-cloud":
        assert flags_of(target) == FLAGS


def test_collected(tmp_path, how):
    state = make_state()
    save(state, tmp_path / "run", **how)
    old = set(packs_of(tmp_path))
    save(state, tmp_path / "run", overwrite=True, **how)
    now = set(packs_of(tmp_path)) - old
    found = ckpt_cloud.gc(tmp_path, older_than=timedelta(0))
    assert not found.objects
    assert found.skipped
    ckpt_cloud.gc(tmp_path, older_than=timedelta(0), encryption_key=KEY)
    assert set(packs_of(tmp_path)) == now
    assert same(load(state, tmp_path / "run")[0], state)


def test_a_manager(tmp_path):
    state = {"w": torch.zeros(9000), "v": torch.arange(9000)}
    options = {"compression": "zstd", "encryption_key": KEY, "encryption_key_id": "k", "sign": SIGNER}
    trusted = SIGNER.public_key()
    with ckpt_cloud.CheckpointManager(tmp_path, keep=ckpt_cloud.LastN(1), trusted_keys=trusted, **options) as manager:
        manager.save(1, state)
        manager.async_save(2, state)
        manager.wait()
        got = emptied(state)
        assert manager.restore(got) == 2
    assert same(got, state)
    assert flags_of(tmp_path / "step-2") == FLAGS
    with ckpt_cloud.CheckpointManager(tmp_path, encryption_key=KEY) as manager:
        assert manager.all_steps() == [2]


def test_by_keyword(tmp_path):
    state = {"w": torch.zeros(9000)}
    options = {"compression": "zstd", "encryption_key": KEY, "encryption_key_id": "k"}
    ckpt_cloud.save(state, checkpoint_id=tmp_path / "1", **options)
    ckpt_cloud.async_save(state, checkpoint_id=tmp_path / "2", **options).result()
    for name in ("1", "2"):
        assert flags_of(tmp_path / name) == FLAGS
        got = emptied(state)
        ckpt_cloud.load(got, checkpoint_id=tmp_path / name, encryption_key=KEY)
        assert same(got, state)
    for given in ({"compression": "zstd"}, {"encryption_key": KEY, "encryption_key_id": "k"}):
        for call in (ckpt_cloud.save, ckpt_cloud.async_save):
            with pytest.raises(InvalidOption, match="own writer, and another was given") as refused:
                call(state, storage_writer=ObjectStoreWriter(tmp_path / "3"), **given)
            assert next(iter(given)) in refused.value.hint


def test_small_chunks_alone_are_not_coded(tmp_path):
    save({"s": torch.tensor(1.5), "v": torch.arange(100)}, tmp_path, compression="zstd")
    assert flags_of(tmp_path) == ["encrypted"]


def test_commands(tmp_path, capsys):
    state = {"w": torch.arange(90_000), "v": torch.zeros(9000), "n": 5}
    save(state, tmp_path / "both", compression="zstd")
    save({**state, "n": 6}, tmp_path / "stream", **KINDS["stream"])
    save(state, tmp_path / "neither", encryption_key=None)
    changed = {**state, "w": state["w"].clone()}
    changed["w"][-1] = 7
    save(changed, tmp_path / "changed", compression="zstd")
    (tmp_path / "key").write_text(KEY.hex())

    def call(command, *words, status=0):
        with pytest.raises(SystemExit) as ended:
            app([command, *map(str, words), "--encryption-key-file", str(tmp_path / "key")], standalone_mode=True)
        assert (ended.value.code or 0) == status
        return capsys.readouterr().out

    both, neither = tmp_path / "both", tmp_path / "neither"
    assert "zstd: " in call("show", both)
    assert json.loads(call("show", both, "--json"))["tensors"]["v"]["codecs"] == ["zstd"]
    assert "no difference in values" in call("diff", both, neither, "--values")
    assert "~ w: values" in call("diff", both, tmp_path / "changed", "--values", status=1)
    assert "? w: sharded differently or transformed" in call("diff", both, tmp_path / "stream", "--values", status=1)
    assert "whole" in call("verify", both, "--deep")
    call("cp", both, tmp_path / "copy")
    assert flags_of(tmp_path / "copy") == FLAGS
    assert "0 object(s)" in call("gc", tmp_path, "--older-than", "0")
