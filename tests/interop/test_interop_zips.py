"""Zip files that we lay out are read by others, and those of others by us."""

import io
import zipfile
import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ckpt_cloud.errors import CkptCloudError, CorruptFile
from ckpt_cloud.interop import zips

NAMES = st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="/\\\0"), min_size=1, max_size=30)


def written(members):
    layout, crcs, out = zips.ZipLayout(), [], b""
    for number, (name, content) in enumerate(members.items()):
        crcs.append(zlib.crc32(content))
        out += layout.add(name, len(content)) + content + layout.descriptor(number, crcs[number])
    assert layout.size == len(out)
    end = layout.end(crcs)
    assert layout.end_size == len(end)
    return out + end


@given(members=st.dictionaries(NAMES, st.binary(max_size=300), max_size=8))
def test_what_is_laid_out_is_read_by_zipfile_and_by_us(members):
    data = written(members)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        assert {info.filename: archive.read(info) for info in archive.infolist()} == members
    start, end = zips.directory_span(data, len(data), "")
    found = {member.name: member for member in zips.members(data[start:end], len(data), "")}
    assert found.keys() == members.keys()
    for name, member in found.items():
        begin = member.start + zips.data_start(data[member.start :], "")
        assert data[begin : begin + member.size] == members[name]
        assert begin % 64 == 0


@given(data=st.binary(max_size=400), flip=st.integers(0, 10_000), to=st.integers(0, 255))
def test_damage_is_an_error_of_ours_or_does_no_harm(data, flip, to):
    good = bytearray(written({"a/data.pkl": b"x" * 40, "a/data/0": data}))
    good[flip % len(good)] = to
    size = len(good)
    try:
        start, end = zips.directory_span(bytes(good), size, "")
        for member in zips.members(bytes(good[start:end]), size, ""):
            assert 0 <= member.start <= size
            zips.data_start(bytes(good[member.start :]), "")
    except CkptCloudError:
        return


def test_files_of_torch_are_listed():
    buffer = io.BytesIO()
    torch.save({"a": torch.arange(10)}, buffer)
    data = buffer.getvalue()
    start, end = zips.directory_span(data, len(data), "")
    listed = {member.name.partition("/")[2] for member in zips.members(data[start:end], len(data), "")}
    assert {"data.pkl", "data/0", "byteorder"} <= listed


@pytest.mark.parametrize("data", [b"", b"PK", b"x" * 100, b"PK\x05\x06" + b"\xff" * 18])
def test_what_is_no_zip_is_told(data):
    def read():
        start, end = zips.directory_span(data, len(data), "where")
        return list(zips.members(data[start:end], len(data), "where"))

    with pytest.raises(CorruptFile):
        read()
