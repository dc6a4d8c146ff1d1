"""Checkpoints of other formats, loaded in place by exact ranges."""

import io
import json
import pickle
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint import _extension
from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.format_utils import DynamicMetaLoadPlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import MetadataIndex

import ckpt_cloud
from ckpt_cloud import ForeignReader
from ckpt_cloud.errors import (
    CheckpointChanged,
    CheckpointNotFound,
    CorruptFile,
    MissingObject,
    StateMismatch,
    Unsupported,
    UnsupportedTensor,
    UntrustedItem,
)
from ckpt_cloud.interop import torch_files
from tests.interop.states import same, zeros_like

RAN = []


class Marking:
    """Notes that it was opened."""

    def __reduce__(self):
        return RAN.append, ("ran",)


class Flip(_extension.StreamTransformExtension):
    """An extension of a user's own: every byte inverted."""

    @staticmethod
    def from_descriptor(version):
        return Flip()

    @staticmethod
    def registry_name():
        return "test.flip"

    def get_descriptor(self):
        return "test.flip/1"

    def transform_to(self, output):
        class Writer(io.RawIOBase):
            def writable(self):
                return True

            def write(self, data):
                output.write(bytes(byte ^ 0xFF for byte in bytes(data)))
                return len(data)

            def close(self):
                output.close()

        return Writer()

    def transform_from(self, input):  # noqa: A002 - DCP's signature
        return io.BytesIO(bytes(byte ^ 0xFF for byte in input.read()))


def save_dcp(state, path, **options):
    dcp.save(state, storage_writer=FileSystemWriter(path, **options), no_dist=True)
    return f"file://{path}"


def edit_metadata(path, change):
    file = Path(path) / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    change(metadata)
    file.write_bytes(pickle.dumps(metadata))


class TestDcp:
    @pytest.mark.parametrize("options", [{}, {"single_file_per_rank": False}, {"thread_count": 2}], ids=str)
    def test_what_filesystem_writer_wrote(self, state, tmp_path, options):
        url = save_dcp(state, tmp_path / "saved", **options)
        got = zeros_like(state)
        ckpt_cloud.load(got, checkpoint_id=url, no_dist=True)
        assert same(got, state)

    def test_with_dcp_itself(self, state, tmp_path):
        reader = ForeignReader(save_dcp(state, tmp_path / "saved"))
        got = zeros_like(state)
        dcp.load(got, storage_reader=reader, no_dist=True)
        assert same(got, state)
        assert reader.format == "dcp"

    def test_what_fsspec_writer_wrote_on_s3(self, state, moto_url, moto_server):
        client = {"endpoint_url": moto_server.endpoint_url}
        dcp.save(state, storage_writer=FsspecWriter(moto_url, client_kwargs=client), no_dist=True)
        got = zeros_like(state)
        ckpt_cloud.load(got, checkpoint_id=moto_url, no_dist=True)
        assert same(got, state)

    def test_a_slice_fetches_its_bytes_and_the_beginning_of_its_record(self, tmp_path):
        whole = torch.randn(1000, 1000)
        opened = ckpt_cloud.open(save_dcp({"w": whole}, tmp_path / "saved"))
        assert opened.report.bytes_moved == 0
        assert torch.equal(opened.get_slice("w")[10:20], whole[10:20])
        assert opened.report.bytes_moved <= 10 * 4000 + 4096
        before = opened.report.bytes_moved
        assert torch.equal(opened.get_slice("w")[20:30], whole[20:30])
        assert opened.report.bytes_moved == before + 10 * 4000

    def test_an_extension_that_is_known(self, state, tmp_path):
        url = save_dcp(state, tmp_path / "saved", _extensions=[Flip()])
        registry = _extension.ExtensionRegistry()
        registry.register(Flip)
        got = zeros_like(state)
        dcp.load(got, storage_reader=ForeignReader(url, extensions=registry), no_dist=True)
        assert same(got, state)

    def test_several_extensions_are_undone_in_reverse(self, state, tmp_path):
        """Which DCP's own reader does not: it undoes first what was done first."""
        extensions = [_extension.ZStandard(), Flip()]
        url = save_dcp(state, tmp_path / "saved", _extensions=extensions)
        registry = _extension.ExtensionRegistry()
        registry.register(Flip)
        got = zeros_like(state)
        dcp.load(got, storage_reader=ForeignReader(url, extensions=registry), no_dist=True)
        assert same(got, state)

    def test_a_transform_that_fails_names_the_tensor(self, tmp_path):
        url = save_dcp({"w": torch.ones(9000)}, tmp_path / "saved", _extensions=[_extension.ZStandard()])
        (file,) = (tmp_path / "saved").glob("*.distcp")
        file.write_bytes(bytes(byte ^ 0x55 for byte in file.read_bytes()))
        with pytest.raises(CorruptFile, match="'w' cannot be undone"):
            ckpt_cloud.load({"w": torch.zeros(9000)}, checkpoint_id=url, no_dist=True)

    def test_an_extension_that_is_not_is_named(self, state, tmp_path):
        url = save_dcp(state, tmp_path / "saved", _extensions=[Flip()])
        with pytest.raises(Unsupported, match=r"test\.flip/1"):
            ckpt_cloud.load(zeros_like(state), checkpoint_id=url, no_dist=True)

    def test_hostile_metadata_do_not_run(self, tmp_path):
        RAN.clear()
        (tmp_path / ".metadata").write_bytes(pickle.dumps(Marking()))
        with pytest.raises(UntrustedItem, match="getattr"):
            ckpt_cloud.load({"a": torch.zeros(1)}, checkpoint_id=f"file://{tmp_path}", no_dist=True)
        assert RAN == []

    def test_a_hostile_item_does_not_run(self, tmp_path):
        RAN.clear()
        url = save_dcp({"a": torch.zeros(1), "bad": Marking()}, tmp_path / "saved")
        RAN.clear()
        with pytest.raises(UntrustedItem, match="bad"):
            ckpt_cloud.load({"a": torch.zeros(1), "bad": 0}, checkpoint_id=url, no_dist=True)
        with pytest.raises(UntrustedItem, match="bad"):
            _ = ckpt_cloud.open(url)["bad"]
        assert RAN == []

    def test_a_hostile_record_does_not_run(self, tmp_path):
        RAN.clear()
        url = save_dcp({"a": torch.zeros(4)}, tmp_path / "saved")
        record = io.BytesIO()
        torch.save(Marking(), record)
        RAN.clear()
        (tmp_path / "saved" / "__0_0.distcp").write_bytes(record.getvalue())
        edit_metadata(
            tmp_path / "saved",
            lambda m: [setattr(s, "length", len(record.getvalue())) for s in m.storage_data.values()],
        )
        with pytest.raises(CorruptFile, match="'a'"):
            _ = ckpt_cloud.open(url)["a"]
        assert RAN == []

    @pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "a//b", "", "a/../../b", "..\\x"])
    def test_a_path_that_leaves_the_checkpoint(self, tmp_path, path):
        url = save_dcp({"a": torch.zeros(4)}, tmp_path / "saved")
        edit_metadata(
            tmp_path / "saved", lambda m: [setattr(s, "relative_path", path) for s in m.storage_data.values()]
        )
        with pytest.raises(CorruptFile, match="'a'"):
            ckpt_cloud.open(url)

    def test_a_missing_file_is_named_with_a_key_of_it(self, tmp_path):
        url = save_dcp({"a": torch.zeros(4)}, tmp_path / "saved")
        (tmp_path / "saved" / "__0_0.distcp").unlink()
        with pytest.raises(MissingObject, match=r"__0_0\.distcp, which holds 'a'"):
            ckpt_cloud.open(url)

    def test_a_file_that_was_cut_short(self, tmp_path):
        url = save_dcp({"a": torch.zeros(4000)}, tmp_path / "saved")
        file = tmp_path / "saved" / "__0_0.distcp"
        file.write_bytes(file.read_bytes()[:2000])
        with pytest.raises(CorruptFile, match="'a'"):
            ckpt_cloud.open(url)

    def test_storage_that_the_metadata_do_not_tell(self, tmp_path):
        url = save_dcp({"a": torch.zeros(4)}, tmp_path / "saved")
        edit_metadata(tmp_path / "saved", lambda m: setattr(m, "storage_data", {}))
        with pytest.raises(CorruptFile, match="'a'"):
            ckpt_cloud.open(url)

    def test_chunks_that_leave_a_part_out(self, tmp_path):
        url = save_dcp({"a": torch.zeros(4)}, tmp_path / "saved")
        edit_metadata(tmp_path / "saved", lambda m: setattr(m.state_dict_metadata["a"], "size", torch.Size([8])))
        with pytest.raises(CorruptFile, match="8 elements, of which 4"):
            ckpt_cloud.open(url)

    def test_chunks_that_overlap_and_leave_a_part_out(self, tmp_path):
        """As many elements as there should be, and some of them nowhere: memory that was never filled."""
        url = save_dcp({"a": torch.zeros(4, 2)}, tmp_path / "saved")

        def shift(metadata):
            told = metadata.state_dict_metadata["a"]
            told.size = torch.Size([6, 2])
            (chunk,) = told.chunks
            told.chunks.append(type(chunk)(torch.Size([1, 0]), torch.Size([2, 2])))
            (index,) = metadata.storage_data
            metadata.storage_data[MetadataIndex("a", torch.Size([1, 0]))] = metadata.storage_data[index]

        edit_metadata(tmp_path / "saved", shift)
        with pytest.raises(CorruptFile, match="12 elements, whose parts overlap and leave a hole"):
            ckpt_cloud.open(url)

    def test_a_chunk_that_is_told_twice(self, tmp_path):
        whole = torch.arange(8.0)
        url = save_dcp({"a": whole}, tmp_path / "saved")
        edit_metadata(
            tmp_path / "saved", lambda m: m.state_dict_metadata["a"].chunks.append(m.state_dict_metadata["a"].chunks[0])
        )
        assert torch.equal(ckpt_cloud.open(url)["a"], whole)

    def test_a_record_that_would_be_copied_endlessly_often(self, tmp_path):
        """What is no plain tensor is opened by torch, and that only once it was screened."""
        url = save_dcp({"a": torch.zeros(4)}, tmp_path / "saved")
        (file,) = (tmp_path / "saved").glob("*.distcp")
        with zipfile.ZipFile(file) as archive:
            pickled = archive.read("archive/data.pkl")
        head, call, rest = pickled.partition(b"ctorch._utils\n_rebuild_tensor_v2\n")
        view = (call + rest[:-1]).replace(b"K\x04\x85", b"\x8a\x07" + (1 << 40).to_bytes(7, "little") + b"\x85")
        view = view.replace(b"K\x01\x85", b"K\0\x85")
        copied = b"ctorch._utils\n_rebuild_device_tensor_from_cpu_tensor\n(" + view
        made = io.BytesIO()
        with zipfile.ZipFile(made, "w", zipfile.ZIP_STORED) as archive:
            for name, content in {
                "data.pkl": head + copied + b"ctorch\nfloat64\nX\3\0\0\0cpu\x89tR.",
                "version": b"3\n",
                "data/0": bytes(16),
            }.items():
                archive.writestr(f"archive/{name}", content)
        file.write_bytes(made.getvalue())

        def grow(metadata):
            (index,) = metadata.storage_data
            metadata.storage_data[index].length = len(made.getvalue())

        edit_metadata(tmp_path / "saved", grow)
        with pytest.raises(CorruptFile, match="more elements than are stored"):
            _ = ckpt_cloud.open(url)["a"]

    def test_a_record_of_another_tensor(self, tmp_path):
        url = save_dcp({"a": torch.zeros(4), "b": torch.zeros(5)}, tmp_path / "saved")

        def swap(metadata):
            a, b = (next(k for k in metadata.storage_data if k.fqn == name) for name in "ab")
            metadata.storage_data[a], metadata.storage_data[b] = metadata.storage_data[b], metadata.storage_data[a]

        edit_metadata(tmp_path / "saved", swap)
        with pytest.raises(CorruptFile, match="'a'"):
            _ = ckpt_cloud.open(url)["a"]

    def test_dtypes_that_differ_are_told_before_anything_changes(self, tmp_path):
        url = save_dcp({"a": torch.ones(4), "b": torch.ones(4)}, tmp_path / "saved")
        got = {"a": torch.zeros(4), "b": torch.zeros(4, dtype=torch.float64)}
        with pytest.raises(StateMismatch, match=r"b: stored torch\.float32, state torch\.float64"):
            ckpt_cloud.load(got, checkpoint_id=url, no_dist=True)
        assert got["a"].eq(0).all()
        dcp.load(got, storage_reader=ForeignReader(url, cast=True), no_dist=True)
        assert got["b"].eq(1).all()

    def test_a_file_that_is_replaced_after_it_was_opened(self, tmp_path):
        url = save_dcp({"a": torch.ones(100_000)}, tmp_path / "saved")
        opened = ckpt_cloud.open(url)
        file = tmp_path / "saved" / "__0_0.distcp"
        other = tmp_path / "other"
        other.write_bytes(file.read_bytes())
        other.replace(file)
        with pytest.raises(CheckpointChanged, match="replaced"):
            _ = opened["a"]

    def test_what_ranks_wrote_each_on_its_own(self, state, tmp_path):
        writer = FileSystemWriter(tmp_path / "saved")
        dcp.save(state, storage_writer=writer, no_dist=True, use_collectives=False)
        assert (tmp_path / "saved" / "__0.metadata").exists()
        got = zeros_like(state)
        dcp.load(got, storage_reader=ForeignReader(f"file://{tmp_path}/saved"), no_dist=True)
        assert same(got, state)

    def test_views_of_one_large_storage(self, tmp_path):
        storage = torch.arange(100_000.0)
        state = {"first": storage[:50_000], "second": storage[50_000:].view(250, 200)}
        got = zeros_like(state)
        ckpt_cloud.load(got, checkpoint_id=save_dcp(state, tmp_path / "saved"), no_dist=True)
        assert same(got, state)

    def test_a_tensor_that_is_not_row_major_in_its_record(self, tmp_path):
        state = {"channels": torch.randn(2, 64, 40, 40).to(memory_format=torch.channels_last)}
        opened = ckpt_cloud.open(save_dcp(state, tmp_path / "saved"))
        assert torch.equal(opened.get_slice("channels")[1, 3:5], state["channels"][1, 3:5])


def test_an_offset_given_as_a_list(tmp_path):
    """Some writers of the format do."""
    url = save_dcp({"a": torch.arange(4.0)}, tmp_path / "saved")

    def change(metadata):
        (stored,) = metadata.storage_data.values()
        index = MetadataIndex("a", torch.Size([0]))
        metadata.storage_data = {index: _StorageInfo(stored.relative_path, stored.offset, stored.length)}

    edit_metadata(tmp_path / "saved", change)
    assert torch.equal(ckpt_cloud.open(url)["a"], torch.arange(4.0))


def save_repository(path, tensors, files):
    """A Hugging Face repository in which `files` hold those keys."""
    path.mkdir(parents=True)
    names = [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    for name, keys in zip(names, files, strict=True):
        save_file({key: tensors[key] for key in keys}, path / name)
    weights = {key: name for name, keys in zip(names, files, strict=True) for key in keys}
    index = {"metadata": {"total_size": 1}, "weight_map": weights}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return f"file://{path}"


TENSORS = {
    "embed.weight": torch.arange(600.0).view(30, 20),
    "head.weight": torch.arange(50, dtype=torch.float64),
    "norm": torch.ones(7, dtype=torch.bfloat16),
}


class TestSafetensors:
    @pytest.fixture
    def repository(self, tmp_path):
        return save_repository(tmp_path / "repo", TENSORS, [["embed.weight"], ["head.weight", "norm"]])

    def test_a_repository(self, repository):
        got = zeros_like(TENSORS)
        ckpt_cloud.load(got, checkpoint_id=repository, no_dist=True)
        assert same(got, TENSORS)

    def test_one_file(self, tmp_path):
        save_file(TENSORS, tmp_path / "weights.safetensors")
        for url in (f"file://{tmp_path}/weights.safetensors", f"file://{tmp_path}"):
            assert same(dict(ckpt_cloud.open(url)), TENSORS)

    def test_a_slice_fetches_its_bytes(self, repository):
        opened = ckpt_cloud.open(repository)
        assert torch.equal(opened.get_slice("embed.weight")[3:5], TENSORS["embed.weight"][3:5])
        assert opened.report.bytes_moved == 2 * 20 * 4

    def test_files_that_the_index_does_not_name_are_left_alone(self, repository, tmp_path):
        save_file({"embed.weight": torch.zeros(1)}, tmp_path / "repo" / "consolidated.safetensors")
        assert same(dict(ckpt_cloud.open(repository)), TENSORS)

    def test_on_s3(self, repository, tmp_path, moto_url, moto_server):
        import boto3

        bucket, _, prefix = moto_url.removeprefix("s3://").partition("/")
        client = boto3.session.Session().client("s3", endpoint_url=moto_server.endpoint_url)
        for file in (tmp_path / "repo").iterdir():
            client.upload_file(str(file), bucket, f"{prefix}/{file.name}")
        got = zeros_like(TENSORS)
        ckpt_cloud.load(got, checkpoint_id=moto_url, no_dist=True)
        assert same(got, TENSORS)

    def test_what_dcp_wrote_sharded(self, tmp_path):
        """Each file notes where its part of a tensor lies."""
        path = tmp_path / "sharded"
        path.mkdir()
        whole = TENSORS["embed.weight"]
        for number, rows in enumerate((slice(0, 12), slice(12, 30)), 1):
            told = {"embed.weight": {"saved_offsets": [rows.start, 0]}}
            save_file(
                {"embed.weight": whole[rows].contiguous()},
                path / f"shard-{number:05d}-model-00001-of-00001.safetensors",
                metadata={"DCP_SHARDING_INFO": json.dumps(told), "DCP_VERSION": "1.0"},
            )
        opened = ckpt_cloud.open(f"file://{path}")
        assert torch.equal(opened["embed.weight"], whole)
        assert torch.equal(opened.get_slice("embed.weight")[10:14, 3], whole[10:14, 3])

    def test_what_hugging_face_storage_writer_wrote(self, tmp_path):
        dcp.save(dict(TENSORS), storage_writer=HuggingFaceStorageWriter(str(tmp_path / "hf")), no_dist=True)
        assert same(dict(ckpt_cloud.open(f"file://{tmp_path}/hf")), TENSORS)

    def test_an_index_that_names_a_missing_file(self, repository, tmp_path):
        (tmp_path / "repo" / "model-00002-of-00002.safetensors").unlink()
        with pytest.raises(MissingObject, match=r"model-00002-of-00002\.safetensors for 'head\.weight' and 1 more"):
            ckpt_cloud.open(repository)

    def test_an_index_that_names_a_key_which_the_file_lacks(self, repository, tmp_path):
        save_file({"norm": TENSORS["norm"]}, tmp_path / "repo" / "model-00002-of-00002.safetensors")
        with pytest.raises(CorruptFile, match=r"'head\.weight' is in model-00002-of-00002\.safetensors"):
            ckpt_cloud.open(repository)

    def test_variants_beside_the_model_are_left_alone(self, tmp_path):
        save_file({"a": torch.ones(3)}, tmp_path / "model.safetensors")
        save_file({"a": torch.ones(3).half()}, tmp_path / "model.fp16.safetensors")
        assert ckpt_cloud.open(f"file://{tmp_path}").get_slice("a").dtype == torch.float32

    def test_two_files_with_one_key(self, tmp_path):
        for name in ("one", "two"):
            save_file({"a": torch.zeros(3)}, tmp_path / f"{name}.safetensors")
        with pytest.raises(CorruptFile, match=r"'a' is in one.safetensors and in two.safetensors"):
            ckpt_cloud.open(f"file://{tmp_path}")

    @pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", ""])
    def test_an_index_that_names_a_file_elsewhere(self, repository, tmp_path, name):
        index = {"weight_map": {"a": name}}
        (tmp_path / "repo" / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(CorruptFile, match="'a'"):
            ckpt_cloud.open(repository)

    def test_an_index_that_gives_a_key_two_files(self, repository, tmp_path):
        path = tmp_path / "model.safetensors.index.json"
        path.write_text('{"weight_map": {"a": "one.safetensors", "b": "one.safetensors", "a": "two.safetensors"}}')
        with pytest.raises(CorruptFile, match="'a' more than once"):
            ckpt_cloud.open(f"file://{tmp_path}")

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "[" * 100_000])
    def test_an_index_that_does_not_decode(self, repository, tmp_path, text):
        (tmp_path / "repo" / "model.safetensors.index.json").write_text(text)
        with pytest.raises(CorruptFile):
            ckpt_cloud.open(repository)


def header(table, data=b"", *, length=None):
    text = json.dumps(table).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def f32(shape, start, end):
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}


DAMAGED = {
    "empty": b"",
    "short": b"\x01\x02",
    "a header longer than the file": header({}, length=1 << 40),
    "a header longer than allowed": header({}, length=200_000_000),
    "no JSON": struct.pack("<Q", 4) + b"nope",
    "a list": header([]),
    "no dict of an entry": header({"a": 3}),
    "a shape of 200,000 dimensions": header({"a": f32([2**61] * 200_000, 0, 8)}, bytes(8)),
    "overlapping": header({"a": f32([2], 0, 8), "b": f32([2], 4, 12)}, bytes(12)),
    "a hole": header({"a": f32([2], 0, 8), "b": f32([1], 12, 16)}, bytes(16)),
    "beyond the end": header({"a": f32([2], 0, 8)}, bytes(4)),
    "more than described": header({"a": f32([2], 0, 8)}, bytes(9)),
    "a shape that does not fit": header({"a": f32([3], 0, 8)}, bytes(8)),
    "a negative shape": header({"a": f32([-2], 0, 8)}, bytes(8)),
    "a huge shape": header({"a": f32([1 << 61, 8], 0, 8)}, bytes(8)),
    "offsets the wrong way": header({"a": f32([2], 8, 0)}, bytes(8)),
    "three offsets": header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]}}, bytes(8)),
    "no offsets": header({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_safetensors_file_is_told_by_name(tmp_path, content):
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(CorruptFile, match=r"bad\.safetensors"):
        ckpt_cloud.open(f"file://{tmp_path}")


def test_an_unknown_element_type_is_told_with_key_and_file(tmp_path):
    table = {"a": {"dtype": "X9", "shape": [2], "data_offsets": [0, 8]}}
    (tmp_path / "new.safetensors").write_bytes(header(table, bytes(8)))
    with pytest.raises(UnsupportedTensor, match="'a' has elements of type 'X9'") as refused:
        ckpt_cloud.open(f"file://{tmp_path}")
    assert "new.safetensors" in refused.value.url


PLAIN_VALUES = [
    b"ab\xff",
    b"",
    bytearray(b"xy"),
    1 + 2j,
    {1, 2},
    frozenset("a"),
    range(1, 9, 2),
    torch.Size((1, 2)),
    torch.device("cuda", 1),
    torch.bfloat16,
    torch.strided,
    np.float64(2.5),
    np.int32(-4),
    np.str_("é"),
]


class TestTorch:
    def test_a_file_of_a_nested_state(self, state, tmp_path):
        torch.save(state, tmp_path / "x.pt")
        got = zeros_like(state)
        ckpt_cloud.load(got, checkpoint_id=f"file://{tmp_path}/x.pt", no_dist=True)
        assert same(got, state)

    def test_dcps_dynamic_planner(self, tmp_path):
        torch.save({"a": torch.arange(6.0), "n": {"b": torch.ones(3, 2)}}, tmp_path / "x.pt")
        got = {"a": torch.zeros(6), "n": {"b": torch.zeros(3, 2)}}
        reader = ForeignReader(f"file://{tmp_path}/x.pt")
        dcp.load(got, storage_reader=reader, planner=DynamicMetaLoadPlanner(), no_dist=True)
        assert torch.equal(got["a"], torch.arange(6.0))
        assert got["n"]["b"].eq(1).all()

    def test_a_slice_of_a_view(self, tmp_path):
        storage = torch.arange(100_000.0)
        torch.save({"view": storage[50_000:].view(250, 200), "turned": storage.view(500, 200).t()}, tmp_path / "x.pt")
        opened = ckpt_cloud.open(f"file://{tmp_path}/x.pt")
        assert torch.equal(opened.get_slice("view")[3], storage[50_600:50_800])
        assert torch.equal(opened.get_slice("turned")[:, 7], storage[1400:1600])

    def test_a_module(self, tmp_path):
        module = torch.nn.Linear(40, 30)
        torch.save({"model": module.state_dict(), "weight": module.weight}, tmp_path / "x.pt")
        opened = ckpt_cloud.open(f"file://{tmp_path}/x.pt")
        assert torch.equal(opened["model.weight"], module.weight)
        assert torch.equal(opened["weight"], module.weight)

    def test_many_small_tensors_take_few_requests(self, tmp_path):
        state = {f"{n}": torch.full((9,), n) for n in range(2000)} | {"big": torch.arange(100_000)}
        torch.save(state, tmp_path / "x.pt")
        reader = ForeignReader(f"file://{tmp_path}/x.pt")
        got = zeros_like(state)
        ckpt_cloud.load(got, storage_reader=reader, no_dist=True)
        assert same(got, state)
        assert reader.report.requests < 10
        assert reader.report.bytes_moved < 3 * (tmp_path / "x.pt").stat().st_size

    def test_tensors_in_a_tuple_are_what_was_saved(self, tmp_path):
        """DCP takes no tuple apart: it is one item, with its tensors."""
        square = torch.arange(100.0).reshape(10, 10)
        inside = (square.t(), 3, {"deep": [square[2:4, 5:], torch.empty(0, 2)]}, torch.tensor(7, dtype=torch.uint16))
        torch.save(
            {"a": torch.zeros(3), "pair": inside, "one": (torch.nn.Parameter(torch.ones(2)),)}, tmp_path / "x.pt"
        )
        opened = ckpt_cloud.open(f"file://{tmp_path}/x.pt")
        turned, number, deep, small = opened["pair"]
        assert number == 3
        assert same([turned, *deep["deep"], small], [square.t(), square[2:4, 5:], torch.empty(0, 2), inside[3]])
        assert torch.equal(opened["one"][0], torch.ones(2))

    def test_a_tuple_of_very_large_tensors_is_refused_by_name(self, tmp_path, monkeypatch):
        monkeypatch.setattr(torch_files, "_MAX_INSIDE", 100)
        torch.save({"a": torch.zeros(3), "pair": (torch.zeros(26),)}, tmp_path / "x.pt")
        with pytest.raises(Unsupported, match="'pair' holds 104 bytes"):
            ckpt_cloud.open(f"file://{tmp_path}/x.pt")

    def test_a_tuple_of_one_element_shown_endlessly_often_is_refused(self, tmp_path):
        torch.save({"a": torch.zeros(3), "pair": (torch.zeros(1).expand(1 << 40),)}, tmp_path / "x.pt")
        with pytest.raises(Unsupported, match="'pair' holds"):
            ckpt_cloud.open(f"file://{tmp_path}/x.pt")

    @pytest.mark.parametrize("value", PLAIN_VALUES, ids=repr)
    def test_values_of_every_plain_kind(self, tmp_path, value):
        torch.save({"a": torch.zeros(3), "value": value}, tmp_path / "x.pt")
        got = ckpt_cloud.open(f"file://{tmp_path}/x.pt")["value"]
        assert got == value
        assert type(got) is type(value)

    def test_what_would_run_code_does_not(self, tmp_path):
        torch.save({"a": torch.zeros(3), "bad": Marking()}, tmp_path / "x.pt")
        RAN.clear()
        with pytest.raises(UntrustedItem, match="getattr"):
            ckpt_cloud.open(f"file://{tmp_path}/x.pt")
        assert RAN == []

    def test_the_format_of_before_1_6(self, tmp_path):
        torch.save({"a": torch.zeros(3)}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
        with pytest.raises(Unsupported, match=r"before torch 1\.6"):
            ckpt_cloud.open(f"file://{tmp_path}/x.pt")

    def test_a_file_of_no_dict(self, tmp_path):
        torch.save(torch.zeros(3), tmp_path / "x.pt")
        with pytest.raises(Unsupported, match="only dicts"):
            ckpt_cloud.open(f"file://{tmp_path}/x.pt")

    def test_a_file_that_was_cut_short(self, tmp_path):
        torch.save({"a": torch.zeros(30_000)}, tmp_path / "x.pt")
        whole = (tmp_path / "x.pt").read_bytes()
        (tmp_path / "x.pt").write_bytes(whole[:-1000])
        with pytest.raises(CorruptFile, match=r"x\.pt"):
            ckpt_cloud.open(f"file://{tmp_path}/x.pt")


def test_nothing_at_all(tmp_path):
    for url in (f"file://{tmp_path}/none", f"file://{tmp_path}/none.safetensors"):
        with pytest.raises(CheckpointNotFound):
            ckpt_cloud.open(url)

    def test_a_text_that_stands_there_often_is_held_once(self, tmp_path):
        text = "x" * 1_000_000
        torch.save({f"key {n}": text for n in range(3000)} | {"w": torch.ones(2)}, tmp_path / "x.pt")
        tracemalloc.start()
        try:
            opened = ckpt_cloud.open(tmp_path / "x.pt")
            assert tracemalloc.get_traced_memory()[1] < 100_000_000
        finally:
            tracemalloc.stop()
        assert opened["key 7"] == text

    def test_a_small_file_does_not_stand_for_endlessly_many_values(self, tmp_path):
        values = [0] * 10
        for _ in range(7):
            values = [values] * 10
        torch.save({"a": values}, tmp_path / "x.pt")
        with pytest.raises(CorruptFile, match="too many"):
            ckpt_cloud.open(tmp_path / "x.pt")


class TestQuantized:
    @pytest.fixture
    def weights(self):
        torch.manual_seed(3)
        quantized = torch.randn(300, 200).to(torch.float8_e4m3fn)
        scales = torch.rand(3, 2) + 0.5
        return {"l.weight": quantized, "l.weight_scale_inv": scales, "l.bias": torch.randn(300)}

    def expected(self, weights):
        factors = weights["l.weight_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)[:300, :200]
        return weights["l.weight"].float() * factors

    def test_a_load(self, tmp_path, weights):
        url = save_repository(tmp_path / "repo", weights, [["l.weight"], ["l.weight_scale_inv", "l.bias"]])
        got = {"l.weight": torch.zeros(300, 200), "l.bias": torch.zeros(300)}
        dcp.load(got, storage_reader=ForeignReader(url, dequantize=torch.float32), no_dist=True)
        assert torch.equal(got["l.weight"], self.expected(weights))
        assert torch.equal(got["l.bias"], weights["l.bias"])

    @pytest.mark.parametrize("part", [(slice(0, 10), slice(0, 10)), (slice(100, 290), slice(127, 129)), (5, 199)])
    def test_a_slice(self, tmp_path, weights, part):
        url = save_repository(tmp_path / "repo", weights, [list(weights)])
        opened = ckpt_cloud.open(url, dequantize=torch.bfloat16)
        assert list(opened) == ["l.bias", "l.weight"]
        assert torch.equal(opened.get_slice("l.weight")[part], self.expected(weights)[part].bfloat16())

    def test_as_dcps_own_reader(self, tmp_path, weights):
        from torch.distributed.checkpoint.quantized_hf_storage import QuantizedHuggingFaceStorageReader

        url = save_repository(tmp_path / "repo", weights, [list(weights)])
        theirs, ours = ({"l.weight": torch.zeros(300, 200)} for _ in range(2))
        dcp.load(theirs, storage_reader=QuantizedHuggingFaceStorageReader(str(tmp_path / "repo")), no_dist=True)
        dcp.load(ours, storage_reader=ForeignReader(url, dequantize=torch.float32), no_dist=True)
        assert same(ours, theirs)

    def test_scales_that_do_not_fit(self, tmp_path, weights):
        url = save_repository(tmp_path / "repo", weights, [list(weights)])
        with pytest.raises(CorruptFile, match=r"'l\.weight' of shape"):
            ckpt_cloud.open(url, dequantize=torch.float32, block_size=64)
