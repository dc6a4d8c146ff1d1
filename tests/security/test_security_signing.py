"""Signatures: what a trusted key signed loads; what is unsigned, by another, or changed in any byte does not."""

import json
import os
import pickle
import subprocess
import sys

import msgspec
import pytest
import torch
from crc32c import crc32c
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

import ckpt_cloud
from ckpt_cloud import ObjectStoreReader, ObjectStoreWriter, TransferOptions
from ckpt_cloud.errors import (
    ChecksumMismatch,
    CkptCloudError,
    CorruptManifest,
    InvalidOption,
    SignatureError,
    Unsupported,
)
from ckpt_cloud.format import manifest as manifests
from ckpt_cloud.format.layout import manifest_key
from ckpt_cloud.format.register import Register, encode
from ckpt_cloud.signing import Signer
from tests import forge

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = KEY.public_key()
OTHER = Ed25519PrivateKey.from_private_bytes(bytes(32))
STATE = {"w": torch.arange(50_000), "n": 5}


def pem(key):
    if isinstance(key, Ed25519PrivateKey):
        return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def save(path, **options):
    options.setdefault("sign", KEY)
    ckpt_cloud.save(STATE, storage_writer=ObjectStoreWriter(path, transfer=TransferOptions(block_size=4096), **options))


def load(path, **options):
    options.setdefault("trusted_keys", PUBLIC)
    state = {"w": torch.zeros(50_000, dtype=torch.int64), "n": 0}
    ckpt_cloud.load(state, storage_reader=ObjectStoreReader(path, **options))
    return state


@pytest.fixture
def url(tmp_path):
    save(tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def key_file(tmp_path):
    path = tmp_path / "key.pem"
    path.write_bytes(pem(KEY))
    return path


def registered(url):
    return msgspec.json.decode((url / "COMMIT").read_bytes(), type=Register)


def edit(url, **changes):
    (url / "COMMIT").write_bytes(encode(msgspec.structs.replace(registered(url), **changes)))


def test_each_form_of_key(tmp_path, key_file):
    (tmp_path / "public.pem").write_bytes(pem(PUBLIC))
    for number, sign in enumerate([KEY, key_file, str(key_file), pem(KEY), KEY.sign]):
        save(tmp_path / f"run-{number}", sign=sign)
        for trusted in (PUBLIC, [OTHER.public_key(), PUBLIC], tmp_path / "public.pem", pem(PUBLIC)):
            assert torch.equal(load(tmp_path / f"run-{number}", trusted_keys=trusted)["w"], STATE["w"])


def test_who_asks_for_no_signature_needs_no_key(url):
    assert load(url, trusted_keys=None)["n"] == 5


def test_unsigned(tmp_path):
    save(tmp_path / "plain", sign=None)
    with pytest.raises(SignatureError, match="not signed") as refused:
        load(tmp_path / "plain")
    assert str(tmp_path) in refused.value.url
    assert load(tmp_path / "plain", require_signature=False)["n"] == 5


def test_by_another(url):
    for options in ({}, {"require_signature": False}):
        with pytest.raises(SignatureError, match="none of the trusted keys"):
            load(url, trusted_keys=[OTHER.public_key()], **options)


def test_a_signature_taken_off(url):
    edit(url, signature=msgspec.UNSET)
    with pytest.raises(SignatureError, match="not signed"):
        load(url)


@pytest.mark.parametrize("change", ["attempt", "key", "size", "sha256", "root", "algorithm", "value", "no-hex"])
def test_what_the_signature_covers(url, change):
    register = registered(url)
    reference, signature = register.manifest, register.signature
    other = manifest_key("0" * 32)
    edits = {
        "attempt": {"attempt": "0" * 32},
        "key": {"manifest": msgspec.structs.replace(reference, key=other)},
        "size": {"manifest": msgspec.structs.replace(reference, size=reference.size + 1)},
        "sha256": {"manifest": msgspec.structs.replace(reference, sha256="0" * 64)},
        "root": {"manifest": msgspec.structs.replace(reference, root=reference.root - 1)},
        "algorithm": {"signature": msgspec.structs.replace(signature, algorithm="none")},
        "value": {"signature": msgspec.structs.replace(signature, value=signature.value[:-2] + "00")},
        "no-hex": {"signature": msgspec.structs.replace(signature, value="zz")},
    }
    edit(url, **edits[change])
    with pytest.raises(SignatureError):
        load(url)


def test_refused_before_data_is_read(url):
    for path in url.glob("data/*/*"):
        path.unlink()
    with pytest.raises(SignatureError):
        load(url, trusted_keys=OTHER.public_key())


@pytest.mark.parametrize("key", [None, bytes(32)], ids=["clear", "encrypted"])
def test_a_manifest_that_grew_is_not_fetched(tmp_path, key):
    """What was signed says how large it is; three gigabytes in its place are not read first."""
    save(tmp_path / "run", encryption_key=key)
    os.truncate(tmp_path / "run" / registered(tmp_path / "run").manifest.key, 3 << 30)
    for call in (load, lambda url, **options: ckpt_cloud.verify(url, trusted_keys=PUBLIC, **options)):
        with pytest.raises(CorruptManifest, match=r"COMMIT names: the object has 3221225472 bytes, more than"):
            call(tmp_path / "run", encryption_key=key)


@pytest.mark.parametrize(
    ("old", "new"), [(b"int64", b"uint8"), (b"ckpt-cloud ", b"ckpt-clown ")], ids=["a page", "the root"]
)
def test_a_part_of_a_manifest_is_held_against_what_was_signed(url, old, new):
    """What still decodes, and says something else; a reader of one tensor fetches no more than this."""
    path = url / registered(url).manifest.key
    assert path.read_bytes().count(old) == 1
    path.write_bytes(path.read_bytes().replace(old, new))
    for trusted in (PUBLIC, None):
        with pytest.raises(CorruptManifest):
            ckpt_cloud.open(url, keys=["w"], trusted_keys=trusted)


def forged(block):
    """Another block of the same CRC32C: its last four bytes make up for the change."""
    changed = bytearray(block)
    changed[100] ^= 1
    wanted = crc32c(bytes(block))
    # The CRC is affine in the last four bytes: solve for them bit by bit.
    changed[-4:] = bytes(4)
    base = crc32c(bytes(changed))
    rows = []
    for bit in range(32):
        trial = bytearray(changed)
        trial[-4 + bit // 8] ^= 1 << bit % 8
        rows.append((crc32c(bytes(trial)) ^ base, 1 << bit))
    need, answer = wanted ^ base, 0
    for column in reversed(range(32)):
        pivot = next(row for row in rows if row[0] >> column & 1)
        rows = [
            (row[0] ^ pivot[0], row[1] ^ pivot[1]) if row[0] >> column & 1 else row for row in rows if row is not pivot
        ]
        if need >> column & 1:
            need, answer = need ^ pivot[0], answer ^ pivot[1]
    changed[-4:] = answer.to_bytes(4, "little")
    assert crc32c(bytes(changed)) == wanted
    assert changed != block
    return bytes(changed)


def test_data_with_the_same_checksums_is_told_by_its_digests(url):
    (path,) = url.glob("data/*/0.safetensors")
    data = path.read_bytes()
    path.write_bytes(data[:8192] + forged(data[8192:12288]) + data[12288:])
    # One who trusts no key looks at checksums, which are for accidents.
    assert not torch.equal(load(url, trusted_keys=None)["w"], STATE["w"])
    with pytest.raises(ChecksumMismatch, match="bytes 8192 to 12288"):
        load(url)
    (fault,) = ckpt_cloud.verify(url, deep=True, trusted_keys=PUBLIC).faults
    assert (fault.start, fault.end) == (8192, 12288)


def sign_without_digests(url):
    root = registered(url)
    data = (url / root.manifest.key).read_bytes()
    objects = [msgspec.structs.replace(entry, digests=b"") for entry in forge.opened(data).objects]
    data = forge.changed(data, objects=objects)
    (url / root.manifest.key).write_bytes(data)
    register = msgspec.structs.replace(root, manifest=manifests.reference(root.manifest.key, data))
    (url / "COMMIT").write_bytes(encode(Signer(KEY).signed(register)))


def test_a_signature_over_a_manifest_without_digests_is_not_enough(url):
    sign_without_digests(url)
    for call in (load, lambda url: ckpt_cloud.verify(url, trusted_keys=PUBLIC)):
        with pytest.raises(SignatureError, match="does not cover"):
            call(url)


def test_a_raised_fence_leaves_the_signature_valid(url):
    edit(url, fence=registered(url).attempt)
    assert load(url)["n"] == 5


def test_a_checkpoint_may_be_copied(url, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    url.rename(tmp_path / "elsewhere" / "copy")
    assert load(tmp_path / "elsewhere" / "copy")["n"] == 5


def test_bad_keys_are_refused_at_once(tmp_path, key_file):
    rsa = generate_private_key(65537, 2048)
    rsa_pem = rsa.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    for sign in (tmp_path / "nowhere.pem", b"no pem", rsa, rsa_pem, 7, PUBLIC):
        with pytest.raises(InvalidOption):
            ObjectStoreWriter(tmp_path / "run", sign=sign)
    for trusted in (tmp_path / "nowhere.pem", b"no pem", key_file, rsa.public_key(), 7, KEY):
        with pytest.raises(InvalidOption):
            ObjectStoreReader(tmp_path / "run", trusted_keys=trusted)
    with pytest.raises(InvalidOption, match="needs trusted_keys"):
        ObjectStoreReader(tmp_path / "run", require_signature=True)


@pytest.mark.parametrize("nothing", [[], (), set()])
def test_no_keys_at_all_are_not_taken_for_no_demand(url, nothing):
    """A list of keys that came out empty must not load whatever is there."""
    calls = (
        lambda: load(url, trusted_keys=nothing),
        lambda: ckpt_cloud.open(url, trusted_keys=nothing),
        lambda: ckpt_cloud.verify(url, trusted_keys=nothing, require_signature=False),
        lambda: ckpt_cloud.copy(url, url / "copy", trusted_keys=nothing),
        lambda: ckpt_cloud.CheckpointManager(url, trusted_keys=nothing),
    )
    for call in calls:
        with pytest.raises(InvalidOption, match="holds no key"):
            call()


COPIES = {
    "copy": ckpt_cloud.copy,
    "signed copy": lambda url, to, **demands: ckpt_cloud.copy(url, to, sign=KEY, **demands),
    "convert": lambda url, to, **demands: ckpt_cloud.convert(url, to / "x.pt", to="torch", **demands),
}


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
def test_nothing_is_made_of_a_checkpoint_that_nobody_signed(url, tmp_path, make):
    make(url, tmp_path / "right", trusted_keys=PUBLIC)
    assert (tmp_path / "right").exists()
    save(tmp_path / "unsigned", sign=None)
    save(tmp_path / "other", sign=OTHER)
    save(tmp_path / "sums")
    sign_without_digests(tmp_path / "sums")
    for name in ("unsigned", "other", "sums"):
        with pytest.raises(SignatureError):
            make(tmp_path / name, tmp_path / "wrong", trusted_keys=PUBLIC)
    assert not (tmp_path / "wrong").exists()
    make(tmp_path / "unsigned", tmp_path / "on-ones-own-word", trusted_keys=PUBLIC, require_signature=False)
    torch.save({"w": torch.ones(2)}, tmp_path / "foreign.pt")
    with pytest.raises(CkptCloudError):
        make(tmp_path / "foreign.pt", tmp_path / "wrong", trusted_keys=PUBLIC)


@pytest.mark.parametrize("form", ["bytes", "path", "encrypted"])
def test_a_private_key_is_in_no_message_and_no_frame(tmp_path, form):
    if form == "encrypted":
        secret = KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"password"))
    else:
        secret = pem(KEY).replace(b"\n", b"\n!", 2)
    (tmp_path / "key.pem").write_bytes(secret)
    given = tmp_path / "key.pem" if form == "path" else secret
    calls = (
        lambda: ObjectStoreWriter(tmp_path, sign=given),
        lambda: ObjectStoreWriter(tmp_path, sign=pem(KEY), compression="lz4"),
        lambda: ckpt_cloud.copy(tmp_path, tmp_path, sign=given),
        lambda: ckpt_cloud.copy(tmp_path, tmp_path, sign=pem(KEY)),
        lambda: ckpt_cloud.CheckpointManager(tmp_path, sign=pem(KEY), when_busy="never"),
    )
    for call in calls:
        with pytest.raises(CkptCloudError) as refused:
            call()
        assert refused.value.__context__ is None or refused.value.__suppress_context__
        # The first frames that were given the key are the caller's, this test's, and those that hand it on.
        shown = frames(refused.tb.tb_next.tb_next, but="sign")
        for part in (secret.split(b"\n")[1], pem(KEY).split(b"\n")[1]):
            assert part.decode() not in shown + str(refused.value)


def frames(tb, but):
    """What a traceback with locals shows, but arguments that were handed on under this name."""
    shown = ""
    while tb is not None:
        shown += repr({name: value for name, value in tb.tb_frame.f_locals.items() if name != but})
        tb = tb.tb_next
    return shown


def test_a_manager_shows_no_private_key(tmp_path):
    manager = ckpt_cloud.CheckpointManager(tmp_path, sign=pem(KEY), check=False)
    held = [vars(manager), *map(repr, vars(manager).values())]
    assert pem(KEY).split(b"\n")[1].decode() not in repr(held)
    manager.close()


def test_a_key_does_not_travel_but_its_path_does(tmp_path, key_file):
    writer = pickle.loads(pickle.dumps(ObjectStoreWriter(tmp_path / "a", sign=key_file)))
    ckpt_cloud.save(STATE, storage_writer=writer)
    assert load(tmp_path / "a")["n"] == 5
    for sign in (KEY, pem(KEY)):
        travelled = pickle.dumps(ObjectStoreWriter(tmp_path / "b", sign=sign))
        assert KEY.private_bytes_raw() not in travelled
        assert b"PRIVATE KEY" not in travelled
        with pytest.raises(Unsupported, match="did not travel"):
            ckpt_cloud.save(STATE, storage_writer=pickle.loads(travelled))
        assert not (tmp_path / "b").exists()
    reader = pickle.loads(pickle.dumps(ObjectStoreReader(tmp_path / "a", trusted_keys=OTHER.public_key())))
    with pytest.raises(SignatureError):
        ckpt_cloud.load({"n": 0}, storage_reader=reader)


def test_a_function_that_signs_badly_leaves_no_checkpoint(tmp_path):
    for bad in (lambda _: b"short", lambda _: "x" * 64):
        with pytest.raises(InvalidOption, match="64 bytes"):
            save(tmp_path / "run", sign=bad)
    assert ckpt_cloud.latest(tmp_path) is None


def test_the_command(url, tmp_path):
    (tmp_path / "public.pem").write_bytes(pem(PUBLIC))
    (tmp_path / "other.pem").write_bytes(pem(OTHER.public_key()))
    code = "from ckpt_cloud.cli import main; main()"

    def verify(key):
        args = [
            sys.executable,
            "-c",
            code,
            "verify",
            str(url),
            "--deep",
            "--json",
            "--trusted-key",
            str(tmp_path / key),
        ]
        return subprocess.run(args, capture_output=True, text=True, check=False)

    assert json.loads(verify("public.pem").stdout)["ok"] is True
    refused = verify("other.pem")
    assert refused.returncode == 4
    assert json.loads(refused.stdout)["error"]["kind"] == "signature"
    assert "none of the trusted keys" in refused.stderr


def test_without_the_library_it_says_what_to_install():
    code = (
        "import sys; sys.modules['cryptography'] = None; import ckpt_cloud\n"
        "from ckpt_cloud.errors import Unsupported\n"
        "try: ckpt_cloud.ObjectStoreWriter('memory://x/y', sign=b'pem')\n"
        "except Unsupported as error: print(error.hint)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "ckpt-cloud[crypto]" in done.stdout
