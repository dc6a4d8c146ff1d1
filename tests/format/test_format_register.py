"""`COMMIT`: what was written is read; anything else is refused by an error of ours, whatever the bytes."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ckpt_cloud.errors import CorruptCommit, CorruptManifest, Unsupported
from ckpt_cloud.format.register import MAX_BYTES, ManifestRef, Register, decode, encode

ID = "0190b5c4f00e7abc8def0123456789ab"
URL = "s3://bucket/run/COMMIT"

ids = st.binary(min_size=16, max_size=16).map(bytes.hex)
references = st.builds(
    ManifestRef,
    key=ids.map("data/{}/manifest".format),
    size=st.integers(1, 2**63 - 1),
    sha256=st.binary(min_size=32, max_size=32).map(bytes.hex),
)
registers = st.builds(Register, st.just("committed"), ids, ids, references) | st.builds(
    Register, st.sampled_from(["aborted", "deleted"]), ids, ids
)
COMMITTED = Register("committed", ID, manifest=ManifestRef(f"data/{ID}/manifest", 17, "ab" * 32))


def document(**changes):
    """`COMMITTED` as JSON with some fields changed; None takes a field out."""
    fields = json.loads(encode(COMMITTED)) | changes
    return json.dumps({name: value for name, value in fields.items() if value is not None}).encode()


@given(registers)
def test_round_trip(register):
    data = encode(register)
    assert decode(data, URL) == register
    assert len(data) < 1024
    assert json.loads(data)["format"] == "ckpt-cloud"


def test_other_fields_are_passed_over():
    assert decode(document(comment="from a later minor version"), URL) == COMMITTED


def test_a_newer_version_is_refused_by_name_whatever_else_it_holds():
    with pytest.raises(Unsupported, match="format version 3") as refused:
        decode(b'{"format": "ckpt-cloud", "version": 3, "state": {"unheard": "of"}}', URL)
    assert URL in str(refused.value)
    assert "3" in refused.value.hint


def test_an_unknown_flag_is_refused_by_name():
    with pytest.raises(Unsupported, match="zstd-chunks"):
        decode(document(flags=["zstd-chunks"]), URL)


REFERENCE = {"key": f"data/{ID}/manifest", "size": 17, "sha256": "ab" * 32}


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"null", id="null"),
        pytest.param(b"[]", id="list"),
        pytest.param(b"\xff\xfe", id="not-utf8"),
        pytest.param(encode(COMMITTED)[:-3], id="cut-off"),
        pytest.param(encode(COMMITTED) + b"{}", id="two-documents"),
        pytest.param(encode(COMMITTED) + b" " * MAX_BYTES, id="oversize"),
        pytest.param(document(format="other"), id="other-format"),
        pytest.param(document(format=None), id="no-format"),
        pytest.param(document(version=None), id="no-version"),
        pytest.param(document(version="1"), id="version-as-text"),
        pytest.param(b'{"format": "ckpt-cloud", "version": ' + b"9" * 5000 + b"}", id="version-of-5000-digits"),
        pytest.param(document(state="half"), id="unknown-state"),
        pytest.param(document(manifest=None), id="committed-without-manifest"),
        pytest.param(document(state="deleted"), id="deleted-with-manifest"),
        pytest.param(document(attempt="x"), id="malformed-attempt"),
        pytest.param(document(fence=ID.upper()), id="malformed-fence"),
        pytest.param(document(manifest=REFERENCE | {"size": 0}), id="empty-manifest"),
        pytest.param(document(manifest=REFERENCE | {"size": -1}), id="negative-size"),
        pytest.param(document(manifest=REFERENCE | {"size": 1.5}), id="fractional-size"),
        pytest.param(document(manifest=REFERENCE | {"sha256": "ab"}), id="short-digest"),
        pytest.param(document(manifest=REFERENCE | {"key": "../../other/manifest"}), id="traversal"),
        pytest.param(document(manifest=REFERENCE | {"key": "/etc/passwd"}), id="absolute"),
        pytest.param(b'{"a":' * 12_000, id="deep-objects"),
        pytest.param(b'{"format": "ckpt-cloud", "version": 1, "x": ' + b"[" * 60_000, id="deep-lists"),
    ],
)
def test_corrupt(data):
    with pytest.raises(CorruptCommit) as refused:
        decode(data, URL)
    assert URL in str(refused.value)


def decodes_or_is_refused(data):
    try:
        register = decode(data, URL)
    except (CorruptCommit, CorruptManifest, Unsupported):
        return
    assert decode(encode(register), URL) == register


@given(st.binary(max_size=300))
def test_garbage(data):
    decodes_or_is_refused(data)


plain_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
fields = st.sampled_from(["state", "attempt", "fence", "manifest", "flags", "format", "version", "key", "size"])


@given(registers, st.dictionaries(fields, plain_json, min_size=1), st.booleans())
def test_other_values_in_a_valid_document(register, changes, inside):
    document = json.loads(encode(register))
    target = document["manifest"] if inside and document["manifest"] else document
    target |= changes
    decodes_or_is_refused(json.dumps(document).encode())


@given(registers, st.data())
@example(COMMITTED, None)
def test_other_bytes_in_a_valid_document(register, draw):
    data = bytearray(encode(register))
    if draw is not None:
        at = draw.draw(st.integers(0, len(data)))
        data[at : at + draw.draw(st.integers(0, 20))] = draw.draw(st.binary(max_size=20))
    decodes_or_is_refused(bytes(data))
