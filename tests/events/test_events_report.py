"""Events, figures, traces and bars, as they are made and as saves and loads make them."""

import io
import json
import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint._extension import ZStandard

import ckpt_cloud
from ckpt_cloud import ObjectStoreReader, ObjectStoreWriter, RetryOptions, Trace, TransferOptions
from ckpt_cloud.events import BytesMoved, PartEnded, PhaseBegan, PhaseEnded, PhaseResized, Recorder, Report, fan_out
from ckpt_cloud.progress import ProgressBar, bar
from ckpt_cloud.trace import chrome_trace, lanes
from tests.faults import server as faults

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

PARTS = TransferOptions(part_size=5 << 20, pack_size=16 << 20, range_size=4 << 20, memory_budget=64 << 20)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def state():
    return {f"w{number}": torch.rand(3 << 20) for number in range(3)}


@pytest.mark.parametrize("place", ["memory", "s3"])
def test_parts_are_told_with_their_times_and_cover_every_byte(place, request, tmp_path):
    url = f"memory://{tmp_path.name}/it" if place == "memory" else request.getfixturevalue("checkpoint_url")
    events = []
    writer = ObjectStoreWriter(url, transfer=PARTS, on_event=events.append)
    ckpt_cloud.save(state(), storage_writer=writer)
    parts = [event for event in events if isinstance(event, PartEnded)]
    assert sum(part.size_bytes for part in parts) == writer.report.bytes_moved
    assert all(0 < part.began_unix_s <= part.ended_unix_s for part in parts)
    if place == "s3":
        assert max(part.size_bytes for part in parts) == PARTS.part_size, "part by part, not object by object"
    (began,) = [event for event in events if isinstance(event, PhaseBegan)]
    assert (began.name, began.total_bytes) == ("write", writer.report.bytes_moved)

    events.clear()
    reader = ObjectStoreReader(url, transfer=PARTS, on_event=events.append)
    ckpt_cloud.load(state(), storage_reader=reader)
    parts = [event for event in events if isinstance(event, PartEnded)]
    assert {part.direction for part in parts} == {"down"}
    assert sum(part.size_bytes for part in parts) == reader.report.bytes_moved
    assert {event.name for event in events if isinstance(event, PhaseEnded)} == {"open", "read", "apply"}


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "zstd"},
        {"compression": "zstd", "encryption_key": bytes(range(32))},
        {"extensions": [ZStandard()]},
    ],
    ids=["zstd", "zstd and encrypted", "a transform"],
)
def test_what_is_compressed_is_told_as_it_becomes_known(tmp_path, options):
    """So that a bar is full when all is stored, and not before."""
    events = []
    writer = ObjectStoreWriter(
        f"memory://{tmp_path.name}/it", memory_budget=32 << 20, on_event=events.append, transfer=PARTS, **options
    )
    compressible = {f"flat{number}": torch.full((3 << 20,), number) for number in range(3)}
    ckpt_cloud.save({**state(), **compressible, "tiny": torch.ones(3)}, storage_writer=writer)
    (began,) = [event for event in events if isinstance(event, PhaseBegan)]
    resized = [event for event in events if isinstance(event, PhaseResized)]
    assert began.total_bytes > resized[-1].total_bytes == writer.report.bytes_moved
    moved, total = 0, began.total_bytes
    for event in events:
        if isinstance(event, PhaseResized):
            total = event.total_bytes
        elif isinstance(event, PartEnded):
            moved += event.size_bytes
            assert moved <= total
    assert moved == total


def test_retries_are_counted(monkeypatch, nobodys_cloud):
    with faults.FaultServer() as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        server.create_bucket("bucket")
        server.fault(faults.refuse(503, "SlowDown"), method="PUT", key="*.safetensors", times=2)
        retry = RetryOptions(max_retries=5, max_backoff_s=0.01)
        writer = ObjectStoreWriter("s3://bucket/run/it", retry=retry)
        ckpt_cloud.save({"w": torch.ones(10)}, storage_writer=writer)
        assert writer.report.retries == 2
        reader = ObjectStoreReader("s3://bucket/run/it", retry=retry)
        ckpt_cloud.load({"w": torch.zeros(10)}, storage_reader=reader)
        assert reader.report.retries == 0


def test_a_save_and_a_load_are_one_log_line_each(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "ckpt_cloud"):
        ckpt_cloud.save({"w": torch.ones(10)}, checkpoint_id=tmp_path / "it")
        ckpt_cloud.load({"w": torch.ones(10)}, checkpoint_id=tmp_path / "it")
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("ckpt_cloud")]
    assert [line.split()[0] for line in lines] == ["saved", "loaded"]
    assert all("MiB/s" in line and "retries" in line and "blocked" in line for line in lines)


def test_a_report_as_a_dict_has_every_figure():
    report = Report(bytes_needed=100, bytes_moved=150, requests=3, seconds=2.0, phases={"write": 1.5})
    found = report.as_dict()
    assert (found["amplification"], found["bytes_per_s"], found["phases"]) == (1.5, 75.0, {"write": 1.5})
    assert json.loads(json.dumps(found)) == found


def test_listeners_fan_out():
    one, other = [], []
    assert fan_out(None, None) is None
    recorder = Recorder(fan_out(one.append, None, other.append))
    recorder.moved("up", "k", 5)
    assert one == other == [BytesMoved("up", "k", 5)]


@pytest.mark.parametrize("kind", [BytesMoved, PhaseEnded])
def test_a_listener_that_fails_harms_nothing(tmp_path, caplog, kind):
    """It may fail after the commit: who took that for a failed save would delete what is visible."""
    told = []

    def listener(event):
        told.append(event)
        if isinstance(event, kind) and getattr(event, "name", "commit") == "commit":
            raise ConnectionError("the metrics server is gone")

    saved, loaded = state(), state()
    ckpt_cloud.save(saved, storage_writer=ObjectStoreWriter(tmp_path, on_event=listener))
    assert "on_event failed" in caplog.text
    assert isinstance(told[-1], kind), "it is called no more"
    ckpt_cloud.load(loaded, checkpoint_id=tmp_path)
    assert all(torch.equal(loaded[name], value) for name, value in saved.items())


def check_trace(trace):
    """The rules of Chrome's Trace Event Format that Perfetto holds files to."""
    assert set(trace) >= {"traceEvents"}
    ends = {}
    for row in trace["traceEvents"]:
        assert row["ph"] in ("X", "M")
        assert isinstance(row["pid"], int)
        assert isinstance(row["tid"], int)
        assert isinstance(row["name"], str)
        if row["ph"] == "M":
            assert row["name"] in ("process_name", "thread_name")
            assert isinstance(row["args"]["name"], str)
        else:
            assert row["ts"] >= 0
            assert row["dur"] >= 1
            ends.setdefault((row["pid"], row["tid"]), []).append((row["ts"], row["ts"] + row["dur"]))
    return ends


spans = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20), st.integers(0, 3)), max_size=30)


@given(spans)
def test_parts_under_way_at_once_lie_on_rows_of_their_own(given_spans):
    parts = [
        PartEnded("up", "data/x/0", 1, 100 + began, 100 + began + length, rank) for began, length, rank in given_spans
    ]
    trace = chrome_trace(parts)
    check_trace(trace)
    assert sum(row["ph"] == "X" for row in trace["traceEvents"]) == len(parts)
    for rank in range(4):
        placed = lanes([part for part in parts if part.rank == rank])
        for part, lane in placed:
            for other, lane_of_other in placed:
                if part is not other and lane == lane_of_other:
                    assert part.ended_unix_s <= other.began_unix_s or other.ended_unix_s <= part.began_unix_s


def test_a_trace_of_a_save_and_a_load(tmp_path):
    trace = Trace()
    ckpt_cloud.save(state(), storage_writer=ObjectStoreWriter(tmp_path / "it", on_event=trace, transfer=PARTS))
    ckpt_cloud.load(state(), storage_reader=ObjectStoreReader(tmp_path / "it", on_event=trace, transfer=PARTS))
    trace.write(tmp_path / "new" / "trace.json")
    found = json.loads((tmp_path / "new" / "trace.json").read_text())
    check_trace(found)
    assert {row["cat"] for row in found["traceEvents"] if row["ph"] == "X"} == {"phase", "up", "down"}


def test_no_bar_without_a_terminal(capfd, tmp_path):
    assert bar("save", file=io.StringIO()) is None
    ckpt_cloud.save({"w": torch.ones(9)}, storage_writer=ObjectStoreWriter(tmp_path / "it", progress=True))
    assert capfd.readouterr().err == ""


def test_the_bar_shows_bytes_rate_and_time_left():
    terminal = Terminal()
    shown = bar("save", file=terminal)
    assert isinstance(shown, ProgressBar)
    shown(PhaseBegan("write", "up", 4_000_000))
    shown(PartEnded("up", "k", 3_000_000, 1.0, 2.0))
    shown._shown.refresh()
    shown(PartEnded("up", "k", 3_000_000, 1.0, 2.0))
    shown(PhaseResized("write", 8_000_000))
    shown(PhaseResized("read", 9_000_000))
    shown(PartEnded("up", "k", 2_000_000, 1.0, 2.0))
    shown(PhaseEnded("write", 1.0))
    text = terminal.getvalue()
    assert "save" in text
    assert "3.0/4.0 MB" in text
    assert "6.0/8.0 MB" in text, "what is sent twice is not counted twice, and the total may change"


def test_other_ranks_show_no_bar():
    terminal = Terminal()
    shown = bar("save", file=terminal)
    shown(PhaseBegan("write", "up", 4_000_000, rank=1))
    shown(PartEnded("up", "k", 3_000_000, 1.0, 2.0, rank=1))
    shown(PhaseEnded("write", 1.0, rank=1))
    assert terminal.getvalue() == ""
