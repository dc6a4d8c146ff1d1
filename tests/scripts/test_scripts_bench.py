"""scripts/bench: what it makes of measurements, and that its sink throws away data and nothing else."""

import importlib
import json
import pkgutil
import shutil
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
GIB = 1 << 30


@pytest.fixture(autouse=True)
def scripts_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "bench_dcp"]:
        del sys.modules[name]


def measured(case, who, number, wall_s, **more):
    from bench_dcp.runs import Run

    figures = {"wall_s": wall_s, "cpu_s": 0.4, "peak_growth": 100 << 20, "bytes": GIB, **more}
    return Run(case.split()[0], case, who, number, figures)


@pytest.fixture
def runs():
    """Two rounds, the second on a machine half as fast."""
    from bench_dcp.runs import Run, Runs

    found = [
        measured("save", who, number, wall * (number + 1))
        for number in range(2)
        for who, wall in {"ckpt_cloud": 1.0, "fsspec": 8.0, "obstore 8 MiB × 8": 0.9, "obstore 16 MiB × 8": 0.5}.items()
    ]
    found += [measured("small save", "ckpt_cloud", 0, 1.3), measured("small save", "planning", 0, 0.8)]
    found.append(measured("memory save 8 GiB llama", "ckpt_cloud", 0, 5.0, peak_growth=577 << 20))
    found.append(Run("reshard", "reshard row 4 → 3", "ckpt_cloud", 0, {"needed": 100, "fetched": 105, "requests": 7}))
    return Runs(found)


def test_every_module_imports():
    import bench_dcp

    names = [module.name for module in pkgutil.walk_packages(bench_dcp.__path__, "bench_dcp.")]
    assert "bench_dcp.tasks.transfer" in names
    for name in names:
        importlib.import_module(name)


def test_ratios_are_taken_round_by_round_against_the_fastest_bare_setting(runs):
    from bench_dcp.targets import judge

    verdicts = {verdict.what: (round(verdict.value, 3), verdict.met) for verdict in judge(runs)}
    assert verdicts == {
        "save: speed ÷ bare obstore 16 MiB × 8": (0.5, False),
        "save: speed ÷ fsspec": (8.0, True),
        "save: CPU of the client": (0.4, True),
        "small save: beyond DCP's planning": (0.5, False),
        "memory save 8 GiB llama: peak beyond the state": (577.0, False),
        "reshard row 4 → 3: fetched ÷ needed": (1.05, True),
    }


def test_a_result_comes_back_from_its_file(runs, tmp_path):
    from bench_dcp.report import Result, markdown

    machine = {"date": "2026-01-02", "processor": "abacus", "cores": 2, "memory_gib": 4, "system": "Linux"}
    machine |= {"load_average": 0.1, "python": "3.11", "versions": {"torch": "2.13"}}
    profile = {"wall_s": 2.0, "cpu_s": 1.0, "phases": {"write": 1.5}, "threads": [["loop", 0.5]], "functions": []}
    result = Result(machine, {"rounds": 2}, ["load: no time"], {"save": profile}, runs)
    result.write(tmp_path / "out" / "bench.json")

    assert {target["met"] for target in json.loads((tmp_path / "out/bench.json").read_text())["targets"]} == {
        True,
        False,
    }
    text = markdown(Result.read(tmp_path / "out" / "bench.json"))
    assert text == markdown(result)
    assert "| save | ckpt_cloud | 1.50 | 0.75 | 0.40 | 100 |  |" in text
    assert "| 4 | small save: beyond DCP's planning | 0.5 s | at most 0.4 s | MISS |" in text
    assert "| save | phase | write | 1.500 | 75% |" in text
    assert "Not measured: load: no time" in text
    # The slower of the bare settings is no limit, so it is not shown.
    assert "obstore 8 MiB" not in text


def test_a_plot_is_drawn_of_speeds_alone(runs, tmp_path):
    from bench_dcp.plot import draw
    from bench_dcp.runs import Runs

    assert draw(runs, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert not draw(Runs(), tmp_path / "none.png")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")
def test_the_sink_throws_data_away_and_forwards_the_rest(monkeypatch):
    import obstore
    from obstore.exceptions import AlreadyExistsError
    from obstore.store import S3Store

    from bench_dcp import line as lines

    with lines.start() as line:

        def store(name):
            env = line.env(name)
            return S3Store(
                lines.BUCKET,
                endpoint=env["AWS_ENDPOINT_URL"],
                access_key_id=env["AWS_ACCESS_KEY_ID"],
                secret_access_key=env["AWS_SECRET_ACCESS_KEY"],
                region=env["AWS_REGION"],
                client_options={"allow_http": True},
            )

        sink = store("sink")
        obstore.put(sink, "a/data/1/0.safetensors", b"x" * 100, use_multipart=False)
        obstore.put(sink, "a/data/1/1.safetensors", b"x" * (12 << 20), chunk_size=5 << 20, use_multipart=True)
        obstore.put(sink, "a/data/1/manifest", b"m" * (12 << 20), chunk_size=5 << 20, use_multipart=True)
        obstore.put(sink, "a/COMMIT", b"{}", mode="create", use_multipart=False)
        with pytest.raises(AlreadyExistsError):
            obstore.put(sink, "a/COMMIT", b"{}", mode="create", use_multipart=False)

        kept = {meta["path"]: meta["size"] for batch in obstore.list(store("direct"), "a") for meta in batch}
        assert kept == {"a/COMMIT": 2, "a/data/1/manifest": 12 << 20}

        lines.take_count(line.counter_url)
        assert len(obstore.get_range(store("counted"), "a/data/1/manifest", start=5, end=1005)) == 1000
        assert lines.take_count(line.counter_url) == (1000, 1)
