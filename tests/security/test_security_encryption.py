"""Encryption: with the key all is as ever; without it a bucket shows nothing, and nothing that was changed loads."""

import base64
import json
import os
import pickle
import shutil
import time
from datetime import timedelta

import msgspec
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # noqa: F401 - skipped as a whole without it

import ckpt_cloud
from ckpt_cloud import ObjectStoreReader, ObjectStoreWriter, TransferOptions
from ckpt_cloud.cli.app import app
from ckpt_cloud.errors import (
    CheckpointExists,
    CorruptCommit,
    Damaged,
    DecryptionFailed,
    EncryptionKeyMissing,
    InvalidOption,
    NotEncrypted,
    WrongEncryptionKey,
)
from ckpt_cloud.format import pages
from ckpt_cloud.format.sealing import SEALED_BLOCK, MasterKey, plain_size
from ckpt_cloud.options import MIB

KEY = bytes(range(1, 33))
OTHER = bytes(range(2, 34))
SIGNER = Ed25519PrivateKey.from_private_bytes(bytes(32))
PARTS = TransferOptions(
    part_size=5 * MIB, pack_size=12 * MIB, range_size=5 * MIB, memory_budget=10 * MIB, inline_limit=1000
)
PLAIN_FIELDS = {"state", "attempt", "fence", "manifest", "flags", "format", "version"}
PER_ID = {"run-a": KEY, "run-b": OTHER}


def key_of(key_id):
    """A function that a pickle can name."""
    return PER_ID[key_id]


def state():
    return {
        "w": torch.arange(4_000_000, dtype=torch.float32),
        "columns": torch.arange(1_500_000, dtype=torch.int16).view(1500, 1000).t(),
        "many": [torch.full((7,), n) for n in range(40)],
        "n": 5,
        "long": "0123456789" * 500,
    }


def blank():
    return {
        "w": torch.zeros(4_000_000),
        "columns": torch.zeros(1000, 1500, dtype=torch.int16),
        "many": [torch.zeros(7, dtype=torch.int64) for _ in range(40)],
        "n": 0,
        "long": "",
    }


def small():
    return {"w": torch.arange(50_000), "n": 5}


def save(url, saved=None, **options):
    options.setdefault("encryption_key", KEY)
    writer = ObjectStoreWriter(url, **options)
    ckpt_cloud.save(saved or small(), storage_writer=writer)
    return writer.report


def load(url, into=None, **options):
    options.setdefault("encryption_key", KEY)
    loaded = into or {"w": torch.zeros(50_000, dtype=torch.int64), "n": 0}
    reader = ObjectStoreReader(url, **options)
    ckpt_cloud.load(loaded, storage_reader=reader)
    return loaded, reader.report


def is_right(loaded, saved):
    flat = [
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(*map(flattened, (loaded, saved)), strict=True)
    ]
    return all(flat)


def flattened(value):
    return [each for v in value.values() for each in (v if isinstance(v, list) else [v])]


@pytest.fixture
def url(tmp_path):
    save(tmp_path / "run")
    return tmp_path / "run"


def commit_of(url):
    return json.loads((url / "COMMIT").read_text())


def objects_of(url):
    return sorted(path for path in (url / "data").rglob("*") if path.is_file())


def test_all_comes_back_in_whole_and_in_part(tmp_path):
    """In parts, through views and through copies, within a budget of two parts."""
    report = save(tmp_path / "run", state(), transfer=PARTS)
    stored = sum(path.stat().st_size for path in objects_of(tmp_path / "run") if path.name != "manifest")
    assert report.bytes_moved == stored
    loaded, _ = load(tmp_path / "run", blank(), transfer=PARTS)
    assert is_right(loaded, state())
    found = ckpt_cloud.verify(tmp_path / "run", deep=True, encryption_key=KEY)
    assert found.ok
    assert found.bytes_read == found.size_bytes
    with ckpt_cloud.open(tmp_path / "run", keys=["columns", "n"], encryption_key=KEY) as opened:
        assert torch.equal(opened.get_slice("columns")[3:5, 7:1400], state()["columns"][3:5, 7:1400])
        assert opened["n"] == 5
        assert opened.report.bytes_moved < 4 * MIB


def test_each_form_of_key(tmp_path):
    (tmp_path / "hex").write_text(KEY.hex() + "\n")
    (tmp_path / "raw").write_bytes(KEY)
    text = base64.b64encode(KEY).decode()
    forms = [KEY, KEY.hex(), text, base64.urlsafe_b64encode(KEY).decode(), tmp_path / "hex", tmp_path / "raw"]
    save(tmp_path / "run", encryption_key=key_of, encryption_key_id="run-a")
    for number, form in enumerate([*forms, key_of, lambda _: text]):
        assert is_right(load(tmp_path / "run", encryption_key=form)[0], small())
        if not callable(form):
            save(tmp_path / f"run-{number}", encryption_key=form)
            assert is_right(load(tmp_path / f"run-{number}")[0], small())


@pytest.mark.parametrize("form", [b"", bytes(16), "abc", "zz" * 32, 5, "no-such-file"])
def test_what_is_no_key_is_refused_at_once(tmp_path, form):
    given = tmp_path / form if form == "no-such-file" else form
    for plug in (ObjectStoreWriter, ObjectStoreReader):
        with pytest.raises(InvalidOption, match="encryption_key="):
            plug(tmp_path, encryption_key=given)


def test_names_of_keys(tmp_path):
    with pytest.raises(InvalidOption, match="which key"):
        save(tmp_path / "none", encryption_key=key_of)
    with pytest.raises(EncryptionKeyMissing, match=r"'run-z'.*KeyError"):
        save(tmp_path / "none", encryption_key=key_of, encryption_key_id="run-z")
    with pytest.raises(InvalidOption, match="encryption_key_id"):
        ObjectStoreWriter(tmp_path, encryption_key_id="x")
    assert not (tmp_path / "none").exists()
    save(tmp_path / "named", encryption_key_id="the key of 2026")
    note = {"algorithm": "aes-256-gcm", "key_id": "the key of 2026", "check": MasterKey(KEY).check}
    assert commit_of(tmp_path / "named")["encryption"] == note
    assert commit_of(tmp_path / "named")["flags"] == ["encrypted"]
    save(tmp_path / "unnamed")
    assert commit_of(tmp_path / "unnamed")["encryption"]["key_id"] == note["check"]


def calls(url, key):
    """Everything that opens a checkpoint."""
    yield lambda: load(url, encryption_key=key)
    yield lambda: ckpt_cloud.load(small(), checkpoint_id=url, encryption_key=key)
    yield lambda: ckpt_cloud.verify(url, encryption_key=key)
    yield lambda: ckpt_cloud.open(url, encryption_key=key)
    yield lambda: ckpt_cloud.open(url, keys=["n"], encryption_key=key)
    yield lambda: ckpt_cloud.copy(url, url.with_name("copy"), encryption_key=key)
    yield lambda: ckpt_cloud.convert(url, url.with_name("copy"), to="ckpt-cloud", encryption_key=key)


@pytest.mark.parametrize("call", range(7))
def test_without_the_key_or_with_another(url, call):
    for key, error in (
        (None, EncryptionKeyMissing),
        (OTHER, WrongEncryptionKey),
        (lambda _: OTHER, WrongEncryptionKey),
    ):
        if callable(key) and call in (5, 6):
            continue
        with pytest.raises(error, match=commit_of(url)["encryption"]["key_id"]) as refused:
            list(calls(url, key))[call]()
        assert str(url) in refused.value.url
        assert "key" in refused.value.hint
    assert not url.with_name("copy").exists()


def test_nothing_is_changed_before_the_key_is_there(url):
    loaded = {"w": torch.full((50_000,), 7), "n": 7}
    with pytest.raises(EncryptionKeyMissing):
        load(url, loaded, encryption_key=None)
    assert loaded["w"].eq(7).all()


def test_what_needs_no_key(url):
    assert ckpt_cloud.latest(url.parent) == f"file://{url}"
    with pytest.raises(CheckpointExists):
        save(url, encryption_key=None)
    save(url, encryption_key=None, overwrite=True)
    assert is_right(load(url)[0], small()), "a key is no harm where nothing is encrypted"
    save(url, overwrite=True)
    ckpt_cloud.delete(url)
    assert not (url / "data").exists()


def test_a_save_without_a_key_is_what_it_was(tmp_path):
    save(tmp_path / "plain", encryption_key=None)
    assert set(commit_of(tmp_path / "plain")) == PLAIN_FIELDS
    (manifest,) = (tmp_path / "plain").rglob("manifest")
    length = commit_of(tmp_path / "plain")["manifest"]["root"]
    assert "salt" not in msgspec.msgpack.decode(manifest.read_bytes()[-length:-8])


SECRETS = {
    "MARKEDtensor": torch.full((5000,), 0x4D41524B, dtype=torch.int32),
    "MARKEDitem": "MARKEDvalue",
    "MARKEDlong": "MARKEDlong" * 10_000,
    "nested": {"MARKEDdeep": [1.5, "MARKEDinner"]},
    "shape": torch.zeros(12347),
}


def test_a_leaked_bucket_shows_nothing(tmp_path):
    """No name, value, shape or note in any byte or key that is stored, and no digest that would confirm a guess."""
    save(
        tmp_path / "run", SECRETS, user_metadata={"MARKEDtag": "MARKEDnote"}, transfer=TransferOptions(inline_limit=100)
    )
    shape = (12347).to_bytes(2, "big"), (12347).to_bytes(2, "little")
    words = [b"MARKED", b"KRAM", b"float32", b"safetensors", b"ckpt-cloud", b"nested", b"chunks"]
    stored = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(stored) == 3
    for path in stored:
        content = path.read_bytes() if path.name != "COMMIT" else b""
        for word in words:
            assert word not in content, path
        assert "MARKED" not in str(path.relative_to(tmp_path))
        # A short pattern turns up by chance, but not as often as it was saved.
        assert sum(content.count(each) for each in shape) < 20
        assert content.count(bytes(4)) < 20
    register = (tmp_path / "run" / "COMMIT").read_text()
    assert "MARKED" not in register
    assert "12347" not in register
    assert set(json.loads(register)) == {
        *("state", "attempt", "fence", "manifest", "flags", "format", "version"),
        "encryption",
    }


def test_the_digest_in_the_register_confirms_no_guess(url, monkeypatch):
    """The root, which it is of, has 32 random bytes in it."""
    roots = []
    decode = pages.decode_root

    def seen(data, size):
        root = decode(data, size)
        roots.append(root)
        return root

    monkeypatch.setattr("ckpt_cloud.format.manifest.decode_root", seen)
    load(url)
    assert {len(root.salt) for root in roots} == {32}


def damaged(url, change):
    """A copy of a checkpoint with one object changed."""
    copy = shutil.copytree(url, url.with_name(f"damaged-{len(list(url.parent.iterdir()))}"))
    change(copy)
    return copy


def refused(url, match=None):
    with pytest.raises(Damaged, match=match) as failed:
        load(url)
    return failed.value


@pytest.mark.parametrize("name", ["manifest", "0.safetensors"])
@pytest.mark.parametrize("at", [0, 11, 12, 5000, -17, -16, -1])
def test_a_flipped_bit_anywhere(url, name, at):
    def flip(copy):
        (path,) = copy.rglob(name)
        content = bytearray(path.read_bytes())
        content[min(at, len(content) - 30)] ^= 4
        path.write_bytes(content)

    copy = damaged(url, flip)
    error = refused(copy, "not what was encrypted")
    assert type(error) is DecryptionFailed
    assert error.ranges
    assert name in error.url
    if name == "0.safetensors":
        found = ckpt_cloud.verify(copy, deep=True, encryption_key=KEY)
        assert [(fault.start, fault.end) for fault in found.faults] == list(error.ranges)
    else:
        with pytest.raises(DecryptionFailed):
            ckpt_cloud.verify(copy, encryption_key=KEY)


def test_blocks_and_objects_that_change_places(url):
    (pack,) = url.rglob("0.safetensors")
    content = pack.read_bytes()

    def swapped(copy):
        (path,) = copy.rglob("0.safetensors")
        first, second, rest = (
            content[:SEALED_BLOCK],
            content[SEALED_BLOCK : 2 * SEALED_BLOCK],
            content[2 * SEALED_BLOCK :],
        )
        path.write_bytes(second + first + rest)

    refused(damaged(url, swapped), "bytes 0 to 131072")
    other = url.with_name("other")
    save(other)
    (theirs,) = other.rglob("0.safetensors")

    def replaced(copy):
        (path,) = copy.rglob("0.safetensors")
        path.write_bytes(theirs.read_bytes())

    refused(damaged(url, replaced), "another was put in its place|not what was encrypted")


@pytest.mark.parametrize("name", ["manifest", "0.safetensors"])
@pytest.mark.parametrize("cut", [1, 20, 40, SEALED_BLOCK, -1, -40, -SEALED_BLOCK])
def test_an_end_that_is_cut_off_or_added(url, name, cut):
    def change(copy):
        (path,) = copy.rglob(name)
        content = path.read_bytes()
        path.write_bytes(content[: max(0, len(content) - cut)] if cut > 0 else content + bytes(-cut))

    copy = damaged(url, change)
    if name == "manifest":
        refused(copy)
        return
    assert not ckpt_cloud.verify(copy, encryption_key=KEY).ok
    if cut > 0:
        refused(copy)
    else:
        # What lies behind the end is never asked for.
        assert is_right(load(copy)[0], small())


def test_a_register_that_lies(url):
    def edited(**changes):
        def edit(copy):
            register = commit_of(copy) | changes
            (copy / "COMMIT").write_text(json.dumps({k: v for k, v in register.items() if v is not None}))

        return damaged(url, edit)

    for changes in ({"flags": []}, {"encryption": None}):
        with pytest.raises(CorruptCommit, match="encrypted"):
            load(edited(**changes))
    refused(edited(flags=[], encryption=None))
    note = commit_of(url)["encryption"]
    with pytest.raises(ckpt_cloud.errors.Unsupported, match="rot13"):
        load(edited(encryption=note | {"algorithm": "rot13"}))
    with pytest.raises(WrongEncryptionKey):
        load(edited(encryption=note | {"check": "00" * 8}))
    manifest = commit_of(url)["manifest"]
    for size in (1, manifest["size"] - 1, manifest["size"] + 1, 1 << 50):
        refused(edited(manifest=manifest | {"size": size, "root": 0}))
        with pytest.raises(Damaged):
            ckpt_cloud.open(edited(manifest=manifest | {"size": size, "root": 1}), keys=["n"], encryption_key=KEY)


def test_signed_and_encrypted(tmp_path):
    save(tmp_path / "run", sign=SIGNER)
    trusted = SIGNER.public_key()
    assert is_right(load(tmp_path / "run", trusted_keys=trusted)[0], small())
    assert ckpt_cloud.verify(tmp_path / "run", deep=True, trusted_keys=trusted, encryption_key=KEY).ok
    save(tmp_path / "unsigned")
    with pytest.raises(ckpt_cloud.errors.SignatureError):
        load(tmp_path / "unsigned", trusted_keys=trusted)


READS = {
    "load": load,
    "open": lambda url, **demands: ckpt_cloud.open(url, encryption_key=KEY, **demands)["n"],
    "a part": lambda url, **demands: ckpt_cloud.open(url, keys=["w"], encryption_key=KEY, **demands).get_slice("w")[:2],
    "verify": lambda url, **demands: ckpt_cloud.verify(url, encryption_key=KEY, **demands),
    "copy": lambda url, **demands: ckpt_cloud.copy(url, f"{url}-copy", source_encryption_key=KEY, **demands),
    "convert": lambda url, **demands: ckpt_cloud.convert(
        url, f"{url}.pt", to="torch", source_encryption_key=KEY, decrypt=True, **demands
    ),
    "manager": lambda url, **demands: ckpt_cloud.CheckpointManager(
        url.parent, prefix="", encryption_key=KEY, **demands
    ).restore({"n": 0}, int(url.name)),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_plain_data_in_the_place_of_encrypted(tmp_path, read):
    """Whoever can write to the bucket and has no key puts a checkpoint of their own there, in clear."""
    save(tmp_path / "1")
    read(tmp_path / "1", require_encryption=True)
    save(tmp_path / "2", encryption_key=None)
    read(tmp_path / "2")
    for path in tmp_path.glob("2[-.]*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(NotEncrypted, match="not encrypted") as refused:
        read(tmp_path / "2", require_encryption=True)
    assert "find out before you load it" in refused.value.hint
    assert not list(tmp_path.glob("2[-.]*"))


def test_other_formats_are_not_encrypted_either(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "x.pt")
    assert "w" in ckpt_cloud.open(tmp_path / "x.pt", encryption_key=KEY, require_encryption=False)
    with pytest.raises(ckpt_cloud.errors.CkptCloudError):
        ckpt_cloud.open(tmp_path / "x.pt", encryption_key=KEY, require_encryption=True)


def test_not_verified_and_said(tmp_path, url):
    with pytest.raises(InvalidOption, match="verify"):
        ObjectStoreReader(url, verify=False, trusted_keys=SIGNER.public_key())
    loaded, report = load(url, verify=False)
    assert is_right(loaded, small())
    assert not report.verified
    assert "NOT VERIFIED" in str(report)
    # A tag that does not fit is an error all the same.
    for pack in url.rglob("0.safetensors"):
        pack.write_bytes(pack.read_bytes()[:-1] + b"?")
    with pytest.raises(DecryptionFailed):
        load(url, verify=False)


def test_the_collector_leaves_alone_what_it_cannot_read(tmp_path):
    """Beside what is committed lies what was replaced: without the key nobody can tell one from the other."""
    run = tmp_path / "run"
    save(run)
    first = set(objects_of(run))
    save(run, {"w": torch.ones(9)}, overwrite=True)
    assert first < set(objects_of(run))
    now = timedelta(0)
    for key, said in ((None, "encrypted with the key"), (OTHER, "another was given")):
        found = ckpt_cloud.gc(tmp_path, older_than=now, encryption_key=key)
        assert not found.objects
        assert said in found.skipped[0][1]
        assert first < set(objects_of(run))
    found = ckpt_cloud.gc(tmp_path, older_than=now, encryption_key=KEY)
    assert {tmp_path / each.key for each in found.objects} == first
    assert not found.skipped
    assert torch.equal(load(run, {"w": torch.zeros(9)})[0]["w"], torch.ones(9))


@pytest.mark.parametrize("key", [None, OTHER, KEY], ids=["no key", "another", "the key"])
def test_the_collector_keeps_what_was_replaced_lately(tmp_path, key):
    """Somebody may be loading it: it stays for the grace age, also where only its key would tell what it needs."""
    run = tmp_path / "run"
    save(run)
    save(run, overwrite=True, encryption_key=None)
    before = set(objects_of(run))
    hour_ago = time.time() - 3600
    for path in before:
        os.utime(path, (hour_ago, hour_ago))
    newest = commit_of(run)["manifest"]["key"]
    os.utime(run / newest)
    ckpt_cloud.gc(tmp_path, older_than=timedelta(minutes=30), encryption_key=key)
    assert set(objects_of(run)) == before


def test_copies(tmp_path, url):
    copies = tmp_path / "copies"
    trials = {
        "same": ({"encryption_key": KEY}, KEY),
        "as-it-was": ({"source_encryption_key": KEY}, KEY),
        "rekeyed": ({"source_encryption_key": KEY, "encryption_key": OTHER}, OTHER),
        "clear": ({"source_encryption_key": KEY, "decrypt": True}, None),
    }
    for name, (options, key) in trials.items():
        ckpt_cloud.copy(url, copies / name, read_back=True, **options)
        assert ("encryption" in commit_of(copies / name)) == (key is not None)
        assert is_right(load(copies / name, encryption_key=key)[0], small())
    ckpt_cloud.copy(copies / "clear", copies / "sealed", encryption_key=KEY, encryption_key_id="x", sign=SIGNER)
    assert commit_of(copies / "sealed")["encryption"]["key_id"] == "x"
    assert is_right(load(copies / "sealed")[0], small())
    with pytest.raises(InvalidOption, match="decrypt"):
        ckpt_cloud.copy(url, copies / "x", encryption_key=KEY, decrypt=True)


def test_a_copy_in_parts_keeps_its_name_for_the_key(tmp_path):
    save(tmp_path / "run", state(), transfer=PARTS, encryption_key=key_of, encryption_key_id="run-b")
    ckpt_cloud.copy(tmp_path / "run", tmp_path / "copy", encryption_key=key_of, transfer=PARTS, read_back=True)
    assert commit_of(tmp_path / "copy")["encryption"]["key_id"] == "run-b"
    assert is_right(load(tmp_path / "copy", blank(), encryption_key=OTHER)[0], state())


def test_conversions(tmp_path, url):
    done = ckpt_cloud.convert(url, tmp_path / "own", to="ckpt-cloud", source_encryption_key=KEY)
    assert done.tensors == 1
    assert is_right(load(tmp_path / "own")[0], small())
    for keys in ({"source_encryption_key": KEY}, {"encryption_key": KEY}):
        with pytest.raises(InvalidOption, match="cannot be encrypted"):
            ckpt_cloud.convert(url, tmp_path / "model.pt", to="torch", **keys)
    ckpt_cloud.convert(url, tmp_path / "model.pt", to="torch", source_encryption_key=KEY, decrypt=True)
    assert torch.equal(torch.load(tmp_path / "model.pt", weights_only=True)["w"], small()["w"])
    ckpt_cloud.convert(tmp_path / "model.pt", tmp_path / "sealed", to="ckpt-cloud", encryption_key=KEY)
    assert is_right(load(tmp_path / "sealed")[0], small())


def test_a_manager(tmp_path):
    with ckpt_cloud.CheckpointManager(tmp_path, encryption_key=KEY, keep=ckpt_cloud.LastN(1)) as manager:
        manager.save(1, small(), metrics={"loss": 0.5})
        manager.async_save(2, small())
        manager.wait()
    loaded = {"w": torch.zeros(50_000, dtype=torch.int64), "n": 0}
    with ckpt_cloud.CheckpointManager(tmp_path, encryption_key=KEY) as manager:
        assert manager.all_steps() == [2]
        assert manager.restore(loaded) == 2
        assert is_right(loaded, small())
    with ckpt_cloud.CheckpointManager(tmp_path) as manager, pytest.raises(EncryptionKeyMissing):
        manager.restore(loaded)


def test_with_the_calls_own_plug_ins(tmp_path):
    ckpt_cloud.save(small(), checkpoint_id=tmp_path / "a", encryption_key=KEY, encryption_key_id="k")
    loaded = {"w": torch.zeros(50_000, dtype=torch.int64), "n": 0}
    ckpt_cloud.load(loaded, checkpoint_id=tmp_path / "a", encryption_key=KEY, verify=False)
    assert is_right(loaded, small())
    with pytest.raises(InvalidOption, match="own writer"):
        ckpt_cloud.save(small(), storage_writer=ObjectStoreWriter(tmp_path / "b"), encryption_key=KEY)
    with pytest.raises(InvalidOption, match="own reader"):
        ckpt_cloud.load(small(), storage_reader=ObjectStoreReader(tmp_path / "b"), verify=False)


class Service:
    """A key service of the user's."""

    def __call__(self, key_id):
        return PER_ID[key_id]


@pytest.mark.parametrize(
    ("given", "travels"),
    [
        pytest.param(lambda _: KEY, True, id="path"),
        pytest.param(lambda _: key_of, True, id="function"),
        pytest.param(lambda _: Service(), True, id="service"),
        pytest.param(lambda _: KEY, False, id="bytes"),
        pytest.param(lambda _: KEY.hex(), False, id="text"),
        pytest.param(lambda _: PER_ID.__getitem__, False, id="bound"),
        pytest.param(lambda _: lambda _: KEY, False, id="lambda"),
    ],
)
def test_to_another_process(tmp_path, request, given, travels):
    """What DCP's process-based async save pickles carries no key; a path and a function travel."""
    (tmp_path / "key").write_text(KEY.hex())
    key = tmp_path / "key" if "path" in request.node.callspec.id else given(tmp_path)
    named = "run-a" if callable(key) else None
    writer = ObjectStoreWriter(tmp_path / "run", encryption_key=key, encryption_key_id=named)
    data = pickle.dumps(writer)
    for mark in (KEY, KEY.hex().encode(), OTHER):
        assert mark not in data
    other = pickle.loads(pickle.dumps(pickle.loads(data)))
    if travels:
        ckpt_cloud.save(small(), storage_writer=other)
        assert is_right(load(tmp_path / "run")[0], small())
    else:
        with pytest.raises(EncryptionKeyMissing, match="did not travel"):
            ckpt_cloud.save(small(), storage_writer=other)
        assert not (tmp_path / "run").exists()
        reader = ObjectStoreReader(tmp_path / "run", encryption_key=key)
        assert KEY not in pickle.dumps(reader)


def test_sizes_in_the_store(url):
    for path in objects_of(url):
        assert plain_size(path.stat().st_size) is not None
    assert commit_of(url)["manifest"]["size"] == plain_size(next(url.rglob("manifest")).stat().st_size)


def test_ranks_of_their_own(tmp_path):
    for rank in range(2):
        writer = ObjectStoreWriter(tmp_path / "run" / f"rank-{rank:05d}", encryption_key=KEY)
        ckpt_cloud.save({"w": torch.full((3,), rank)}, storage_writer=writer)
    assert ckpt_cloud.verify(tmp_path / "run", deep=True, encryption_key=KEY).objects == 2


@pytest.mark.parametrize("engine", ["native", "fsspec"])
def test_on_s3(s3_url, engine):
    """Parts are as large as S3 wants them, in each engine."""
    url = f"{s3_url}/{engine}"
    save(url, state(), transfer=PARTS, engine=engine)
    loaded, report = load(url, blank(), transfer=PARTS, engine=engine)
    assert is_right(loaded, state())
    assert report.verified
    ckpt_cloud.copy(url, f"{url}-copy", encryption_key=KEY, transfer=PARTS)
    assert is_right(load(f"{url}-copy", blank(), transfer=PARTS, engine=engine)[0], state())


class TestCommands:
    """`ckpt-cloud`, with the key in a file or in the environment."""

    @pytest.fixture(autouse=True)
    def key_file(self, tmp_path, monkeypatch):
        monkeypatch.delenv("CKPT_CLOUD_ENCRYPTION_KEY", raising=False)
        (tmp_path / "key").write_text(KEY.hex() + "\n")
        (tmp_path / "other").write_text(OTHER.hex())
        return tmp_path / "key"

    def call(self, capsys, *words, status=0):
        with pytest.raises(SystemExit) as ended:
            app(list(map(str, words)), standalone_mode=True)
        assert (ended.value.code or 0) == status
        return capsys.readouterr().out

    def test_reading(self, url, key_file, capsys, monkeypatch):
        save(url.with_name("plain"), encryption_key=None)
        option = ("--encryption-key-file", key_file)
        assert "int64" in self.call(capsys, "show", url, *option)
        assert "no difference" in self.call(capsys, "diff", url, url.with_name("plain"), "--values", *option)
        assert "whole" in self.call(capsys, "verify", url, "--deep", *option)
        assert "0 object(s)" in self.call(capsys, "gc", url.parent, "--older-than", "0", *option)
        assert "committed" in self.call(capsys, "ls", url.parent)
        monkeypatch.setenv("CKPT_CLOUD_ENCRYPTION_KEY", base64.b64encode(KEY).decode())
        for command in (("show", url), ("verify", url), ("diff", url, url)):
            self.call(capsys, *command)

    def test_only_encrypted(self, url, tmp_path, key_file):
        save(tmp_path / "plain", encryption_key=None)
        option = ["--require-encryption", "--encryption-key-file", str(key_file)]
        for command in (
            ["verify"],
            ["cp", str(tmp_path / "a")],
            ["convert", str(tmp_path / "b"), "--to", "ckpt-cloud"],
        ):
            with pytest.raises(NotEncrypted):
                app([command[0], str(tmp_path / "plain"), *command[1:], *option], standalone_mode=False)
            app([command[0], str(url), *command[1:], *option], standalone_mode=False)

    def test_without(self, url, tmp_path):
        with pytest.raises(EncryptionKeyMissing, match="encrypted"):
            app(["show", str(url)], standalone_mode=False)
        with pytest.raises(WrongEncryptionKey):
            app(["verify", str(url), "--encryption-key-file", str(tmp_path / "other")], standalone_mode=False)

    def test_writing(self, url, tmp_path, key_file, capsys, monkeypatch):
        def encryption_of(name):
            return commit_of(tmp_path / name).get("encryption", {}).get("key_id")

        monkeypatch.setenv("CKPT_CLOUD_ENCRYPTION_KEY", KEY.hex())
        self.call(capsys, "cp", url, tmp_path / "same")
        self.call(capsys, "cp", url, tmp_path / "clear", "--decrypt")
        new = ("--source-key-file", key_file, "--encryption-key-file", tmp_path / "other", "--encryption-key-id", "new")
        self.call(capsys, "cp", url, tmp_path / "rekeyed", *new)
        self.call(capsys, "cp", tmp_path / "clear", tmp_path / "still-clear")
        self.call(capsys, "convert", url, tmp_path / "converted", "--to", "ckpt-cloud")
        self.call(capsys, "convert", url, tmp_path / "model.pt", "--to", "torch", "--decrypt")
        assert encryption_of("same") == encryption_of("converted") == MasterKey(KEY).check
        assert encryption_of("clear") is encryption_of("still-clear") is None
        assert encryption_of("rekeyed") == "new"
        assert is_right(load(tmp_path / "rekeyed", encryption_key=OTHER)[0], small())
