"""The page that `show --html` writes: right, self-contained, harmless, and drawn by a real browser."""

import json
import re
import shutil
import subprocess

import pytest
import torch
import typer.testing
from hypothesis import given
from hypothesis import strategies as st

import ckpt_cloud
from ckpt_cloud import ObjectStoreWriter, Trace
from ckpt_cloud.cli.app import app
from ckpt_cloud.cli.picture.treemap import Box, Node, squarify
from ckpt_cloud.errors import InvalidOption

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

EVIL = "<script>document.title='evil'</script><img src=x onerror=document.title='evil'>"


def invoke(*args):
    return typer.testing.CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture
def saved(tmp_path):
    """A checkpoint with names that are no good citizens, and the trace of its save."""
    state = {"model": {f"layer{n}": {"w": torch.rand(40, 10 * n + 1)} for n in range(6)}, EVIL: torch.ones(900)}
    trace = Trace()
    writer = ObjectStoreWriter(
        tmp_path / "run/step-1", on_event=trace, metrics={EVIL[:60]: 1.0}, user_metadata={"note": EVIL}
    )
    ckpt_cloud.save(state, storage_writer=writer)
    trace.write(tmp_path / "trace.json")
    return tmp_path / "run/step-1", tmp_path / "trace.json"


@pytest.fixture
def page(saved, tmp_path):
    done = invoke("show", saved[0], "--html", tmp_path / "page.html", "--trace", saved[1])
    assert done.exit_code == 0, done.output
    return tmp_path / "page.html"


def test_the_page_shows_tensors_ranks_and_times(page):
    text = page.read_text()
    for said in ("Where the bytes are", "model.layer5.w", "float32, 40 × 51", "rank 0: 1 object(s), 7 shard(s)"):
        assert said in text
    assert ">commit</text>" in text or "commit (rank 0)" in text


def test_the_page_needs_nothing_and_runs_nothing(page):
    text = page.read_text()
    assert "<script" not in text
    assert "<img" not in text
    assert not re.findall(r"""(?:src|href)\s*=|url\(|@import""", re.sub(r"&lt;.*?&gt;", "", text))
    assert "default-src 'none'" in text
    assert "&lt;script&gt;" in text


def test_without_a_trace_there_is_no_timeline(saved, tmp_path):
    assert invoke("show", saved[0], "--html", tmp_path / "page.html").exit_code == 0
    assert "Timeline" not in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff", b'{"traceEvents": [{"ph": 7}]}'])
def test_what_is_no_trace_is_refused(saved, tmp_path, content):
    (tmp_path / "bad.json").write_bytes(content)
    done = invoke("show", saved[0], "--html", tmp_path / "page.html", "--trace", tmp_path / "bad.json")
    assert isinstance(done.exception, InvalidOption)
    assert "no trace file" in str(done.exception)


def test_mistakes(saved, tmp_path):
    assert isinstance(invoke("show", saved[0], "--trace", saved[1]).exception, InvalidOption)
    assert isinstance(invoke("show", saved[0], "--html", tmp_path / "no/such/page.html").exception, InvalidOption)


sizes = st.lists(st.integers(1, 10**12), min_size=1, max_size=40).map(lambda found: sorted(found, reverse=True))


@given(sizes, st.integers(10, 2000), st.integers(10, 2000))
def test_boxes_fill_the_whole_in_proportion(sizes, width, height):
    boxes = squarify(sizes, Box(0, 0, width, height))
    assert len(boxes) == len(sizes)
    area, total = width * height, sum(sizes)
    for size, box in zip(sizes, boxes, strict=True):
        assert box.width * box.height == pytest.approx(area * size / total, rel=1e-6, abs=1e-6)
        assert box.x >= 0
        assert box.y >= 0
        assert box.x + box.width <= width * (1 + 1e-6)
        assert box.y + box.height <= height * (1 + 1e-6)


def test_nodes_add_up():
    root = Node("", "")
    root.add("model.a", 3, "x")
    root.add("model.b.c", 5, "y")
    root.add("n", 0, "z")
    assert (root.size, [(node.path, node.size) for node in root.below()]) == (8, [("model", 8)])
    assert [node.path for node in root.children["model"].below()] == ["model.b", "model.a"]


@pytest.mark.slow
def test_a_browser_draws_it(page, tmp_path):
    browser = next((found for name in ("chromium", "google-chrome") if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip("no chromium here")
    call = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    shot = tmp_path / "page.png"
    size = ["--window-size=1200,1400", f"--screenshot={shot}"]
    subprocess.run([*call, *size, page.as_uri()], check=True, capture_output=True, timeout=120)
    assert shot.stat().st_size > 20_000
    drawn = subprocess.run(
        [*call, "--dump-dom", page.as_uri()], check=True, capture_output=True, text=True, timeout=120
    ).stdout
    assert drawn.count("<svg") == 3
    assert drawn.count("<rect") > 10
    assert "<title>file:///" in drawn, "nothing changed the title"
    assert "evil</title>" not in drawn.partition("</head>")[0]


def test_json_stays_json(saved, tmp_path):
    done = invoke("show", saved[0], "--json", "--html", tmp_path / "page.html")
    assert "tensors" in json.loads(done.stdout)
