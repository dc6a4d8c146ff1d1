"""Every way to call it: DCP's own functions with our plug-ins, ours, asynchronous ones, and DCP's options."""

import logging
import pickle
import secrets
import threading

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse

import ckpt_cloud
from ckpt_cloud import ObjectStoreReader, ObjectStoreWriter
from ckpt_cloud.errors import (
    CheckpointExists,
    CheckpointNotFound,
    InvalidOption,
    InvalidURL,
    RankFailed,
    SaveInFlight,
    Unsupported,
)


def state(value=1.0):
    return {"w": torch.full((300, 200), float(value)), "step": int(value)}


def check(url, value=1.0, **reader_options):
    loaded = state(-1)
    ckpt_cloud.load(loaded, storage_reader=ObjectStoreReader(url, **reader_options))
    assert loaded["w"].eq(value).all()
    assert loaded["step"] == value


def test_dcp_with_the_plug_ins(url):
    dcp.save(state(), storage_writer=ObjectStoreWriter(url))
    loaded = state(-1)
    dcp.load(loaded, storage_reader=ObjectStoreReader(url))
    assert loaded["w"].eq(1).all()
    assert loaded["step"] == 1


def test_the_url_as_checkpoint_id(url):
    dcp.save(state(), checkpoint_id=url, storage_writer=ObjectStoreWriter())
    loaded = state(-1)
    dcp.load(loaded, checkpoint_id=url, storage_reader=ObjectStoreReader())
    assert loaded["w"].eq(1).all()


def test_one_writer_saves_many_steps(url):
    """`reset` changes the URL and nothing else."""
    writer = ObjectStoreWriter(url, overwrite=True, transfer=ckpt_cloud.TransferOptions(inline_limit=0))
    for step in (1, 2, 3):
        dcp.save(state(step), checkpoint_id=f"{url}-{step}", storage_writer=writer)
        assert writer.report.requests == 1
    dcp.save(state(9), checkpoint_id=f"{url}-3", storage_writer=writer)
    for step, value in ((1, 1), (2, 2), (3, 9)):
        check(f"{url}-{step}", value)


def test_options_survive_reset(moto_server):
    """Endpoint and keys as arguments, with nothing in the environment."""
    moto_server.create_bucket("reset-bucket")
    options = {
        "endpoint_url": moto_server.endpoint_url,
        "access_key_id": moto_server.env["AWS_ACCESS_KEY_ID"],
        "secret_access_key": moto_server.env["AWS_SECRET_ACCESS_KEY"],
        "region": "us-east-1",
    }
    writer = ObjectStoreWriter("s3://reset-bucket/first", **options)
    dcp.save(state(), checkpoint_id="s3://reset-bucket/second", storage_writer=writer)
    check("s3://reset-bucket/second", **options)
    assert ckpt_cloud.latest("s3://reset-bucket/", store=ckpt_cloud.StoreOptions(**options)) == (
        "s3://reset-bucket/second"
    )


def test_without_a_url():
    with pytest.raises(InvalidURL, match="no URL was given") as refused:
        ckpt_cloud.save(state())
    assert "checkpoint_id" in refused.value.hint


def test_validate_checkpoint_id():
    for good in ("s3://bucket/run", "file:///tmp/x", "memory://a/b", "/tmp/x", "relative/path"):
        assert ObjectStoreWriter.validate_checkpoint_id(good)
        assert ObjectStoreReader.validate_checkpoint_id(good)
    for bad in ("gopher://x/y", "s3://", "s3:/bucket/run", "s3://user:secret@bucket/x", ""):
        assert not ObjectStoreWriter.validate_checkpoint_id(bad)


def test_storage_meta_reaches_the_planner_and_the_reader(url):
    seen = []

    class Planner(DefaultSavePlanner):
        def set_up_planner(self, state_dict, storage_meta=None, is_coordinator=False):
            seen.append(storage_meta)
            super().set_up_planner(state_dict, storage_meta, is_coordinator)

    ckpt_cloud.save(state(), checkpoint_id=url, planner=Planner())
    assert isinstance(seen[0], StorageMeta)
    assert seen[0].checkpoint_id == url
    assert ObjectStoreReader(url).read_metadata().storage_meta.checkpoint_id == url


@pytest.mark.parametrize("planner_data", [None, {"a": [1, (2.5, "x"), {"k": b"v"}]}, [("t", 1)]])
def test_a_planners_own_data(url, planner_data):
    class Planner(DefaultSavePlanner):
        def create_global_plan(self, all_plans):
            plans, metadata = super().create_global_plan(all_plans)
            metadata.planner_data = planner_data
            return plans, metadata

    ckpt_cloud.save(state(), checkpoint_id=url, planner=Planner())
    assert ObjectStoreReader(url).read_metadata().planner_data == planner_data


def test_a_planners_data_that_would_need_pickle(url, keys):
    class Planner(DefaultSavePlanner):
        def create_global_plan(self, all_plans):
            plans, metadata = super().create_global_plan(all_plans)
            metadata.planner_data = {"a": object()}
            return plans, metadata

    with pytest.raises(Unsupported, match="without pickle"):
        ckpt_cloud.save(state(), checkpoint_id=url, planner=Planner())
    assert keys(url) == []


def test_no_flattening(url):
    nested = {"a": {"w": torch.ones(3)}, "b": torch.zeros(2)}
    ckpt_cloud.save(nested, checkpoint_id=url, planner=DefaultSavePlanner(flatten_state_dict=False))
    loaded = {"a": None, "b": torch.ones(2)}
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    ckpt_cloud.load(loaded, checkpoint_id=url, planner=planner)
    assert torch.equal(loaded["a"]["w"], torch.ones(3))
    assert torch.equal(loaded["b"], torch.zeros(2))


def test_a_part_of_the_state(url):
    ckpt_cloud.save(state(), checkpoint_id=url)
    loaded = {"w": torch.zeros(300, 200), "new": torch.full((2,), 7.0)}
    ckpt_cloud.load(loaded, checkpoint_id=url, planner=DefaultLoadPlanner(allow_partial_load=True))
    assert loaded["w"].eq(1).all()
    assert loaded["new"].eq(7).all()


def test_a_planner_that_converts(url):
    """As in DCP's own documentation: the plan and the data change in tandem."""

    class Half(DefaultSavePlanner):
        def create_local_plan(self):
            plan = super().create_local_plan()
            for item in plan.items:
                if item.tensor_data is not None:
                    item.tensor_data.properties.dtype = torch.float16
            return plan

        def resolve_data(self, write_item):
            data = super().resolve_data(write_item)
            return data.half() if isinstance(data, torch.Tensor) else data

    ckpt_cloud.save(state(), checkpoint_id=url, planner=Half())
    loaded = {"w": torch.zeros(300, 200, dtype=torch.float16)}
    ckpt_cloud.load(loaded, checkpoint_id=url)
    assert loaded["w"].eq(1).all()


def test_cast_while_loading(url):
    ckpt_cloud.save(state(), checkpoint_id=url)
    loaded = {"w": torch.zeros(300, 200, dtype=torch.bfloat16)}
    ckpt_cloud.load(loaded, storage_reader=ObjectStoreReader(url, cast=True))
    assert loaded["w"].eq(1).all()


@pytest.fixture
def no_cached_plans():
    """DCP keeps plans in class attributes."""
    caches = [name for name in vars(SavePlanner) if name.startswith("_cached")]
    for name in caches:
        getattr(SavePlanner, name).clear()
    yield
    for name in caches:
        getattr(SavePlanner, name).clear()


def test_plan_caching_keeps_each_save_its_own(url, no_cached_plans):
    for step in (1, 2, 3):
        planner = DefaultSavePlanner(enable_plan_caching=True)
        ckpt_cloud.save(state(step), checkpoint_id=f"{url}-{step}", planner=planner)
    for step in (1, 2, 3):
        check(f"{url}-{step}", step)


def test_an_existing_checkpoint_is_refused_before_a_byte_is_sent(url, keys):
    ckpt_cloud.save(state(1), checkpoint_id=url)
    before = keys(url)
    with pytest.raises(CheckpointExists) as refused:
        ckpt_cloud.save(state(2), checkpoint_id=url)
    assert refused.value.url == url
    assert "overwrite" in refused.value.hint
    assert isinstance(refused.value, FileExistsError)
    assert keys(url) == before
    check(url, 1)


def test_overwrite_replaces_and_leaves_the_old_data_to_who_reads_it(url, keys):
    ckpt_cloud.save(state(1), checkpoint_id=url)
    before = set(keys(url))
    old_reader = ObjectStoreReader(url)
    opened = old_reader.open()
    ckpt_cloud.save(state(2), storage_writer=ObjectStoreWriter(url, overwrite=True))
    assert before <= set(keys(url))
    assert len(set(keys(url)) - before) == 2
    check(url, 2)
    old_reader.adopt(opened)
    loaded = state(-1)
    dcp.load(loaded, storage_reader=old_reader)
    assert loaded["w"].eq(1).all()


def test_overwrite_of_nothing_is_a_save(url):
    ckpt_cloud.save(state(), storage_writer=ObjectStoreWriter(url, overwrite=True))
    check(url)


def test_async_save(url):
    future = ckpt_cloud.async_save(state(), checkpoint_id=url)
    future.result(timeout=60)
    check(url)


def test_async_save_with_a_stager_in_the_background(url):
    stager = DefaultStager(StagingOptions(False, False, True, False))
    try:
        response = ckpt_cloud.async_save(state(), checkpoint_id=url, async_stager=stager)
        assert isinstance(response, AsyncSaveResponse)
        response.staging_completion.result(timeout=60)
        response.upload_completion.result(timeout=60)
    finally:
        stager.close()
    check(url)


def test_an_async_save_that_fails_says_so_and_cleans_up(url, keys):
    class Failing(DefaultSavePlanner):
        def resolve_data(self, write_item):
            if write_item.index.fqn == "z":
                raise ValueError("no such thing")
            return super().resolve_data(write_item)

    future = ckpt_cloud.async_save({**state(), "z": torch.ones(3)}, checkpoint_id=url, planner=Failing())
    with pytest.raises(ckpt_cloud.CkptCloudError, match="no such thing"):
        future.result(timeout=60)
    assert keys(url) == []
    with pytest.raises(CheckpointNotFound):
        check(url)


def test_a_planners_own_os_error_is_not_taken_for_the_stores(url, keys):
    class Failing(DefaultSavePlanner):
        def resolve_data(self, write_item):
            if write_item.index.fqn == "w":
                raise PermissionError(13, "no entry to the planner")
            return super().resolve_data(write_item)

    big = {"a": torch.zeros(5 << 20), "w": torch.ones(3)}
    with pytest.raises(RankFailed, match="no entry to the planner"):
        ckpt_cloud.save(big, checkpoint_id=url, planner=Failing())
    assert keys(url) == []


def test_a_failed_save_leaves_the_checkpoint_that_is_there(url, keys):
    class Failing(DefaultSavePlanner):
        def resolve_data(self, write_item):
            raise RuntimeError("out of luck")

    ckpt_cloud.save(state(1), checkpoint_id=url)
    before = keys(url)
    with pytest.raises(ckpt_cloud.CkptCloudError, match="out of luck"):
        ckpt_cloud.save(state(2), storage_writer=ObjectStoreWriter(url, overwrite=True), planner=Failing())
    assert keys(url) == before
    check(url, 1)


def test_pickles_carry_no_key():
    keys = {"access_key_id": "AKIAMARKED", "secret_access_key": "MARKEDSECRET", "session_token": "MARKEDTOKEN"}
    for plug_in in (ObjectStoreWriter("s3://bucket/x", **keys), ObjectStoreReader("s3://bucket/x", **keys)):
        data = pickle.dumps(plug_in)
        assert b"MARKED" not in data
        assert "MARKED" not in repr(plug_in) + repr(vars(plug_in))
        assert pickle.loads(data).checkpoint_id == "s3://bucket/x"


def test_the_other_process_says_what_became_of_the_keys():
    writer = ObjectStoreWriter("s3://bucket/x", access_key_id="AKIAMARKED", secret_access_key="MARKED")
    with pytest.raises(ckpt_cloud.errors.MissingCredentials) as missing:
        ckpt_cloud.save(state(), storage_writer=pickle.loads(pickle.dumps(writer)))
    assert "not pickled" in missing.value.hint


def test_wrong_options_are_refused_where_they_are_made():
    for wrong in ({"no_such_option": 1}, {"access_key_id": "x"}, {"memory_budget": 1}, {"secrets_dropped": True}):
        with pytest.raises(InvalidOption):
            ObjectStoreWriter("s3://bucket/x", **wrong)
    for wrong in ({"part_size": 1 << 20}, {"block_size": 5000}, {"max_requests": 0}, {"pack_size": 1}):
        with pytest.raises(InvalidOption):
            ckpt_cloud.TransferOptions(**wrong)


def test_objects_spread_over_prefixes(url, keys):
    transfer = ckpt_cloud.TransferOptions(spread=2, pack_size=5 << 20, part_size=5 << 20, memory_budget=32 << 20)
    big = {f"w{number}": torch.full((1024, 1024), float(number)) for number in range(12)}
    dcp.save(big, storage_writer=ObjectStoreWriter(url, transfer=transfer))
    folders = {key.split("/")[1] for key in keys(url) if key.endswith(".safetensors")}
    assert len(folders) > 3
    assert all(folder[2] == "-" for folder in folders)
    loaded = {name: torch.zeros_like(value) for name, value in big.items()}
    dcp.load(loaded, storage_reader=ObjectStoreReader(url))
    assert all(torch.equal(loaded[name], value) for name, value in big.items())
    with pytest.raises(InvalidOption, match="spread"):
        ckpt_cloud.TransferOptions(spread=5)


def test_reports_and_events(url):
    events = []
    writer = ObjectStoreWriter(url, on_event=events.append)
    ckpt_cloud.save(state(), storage_writer=writer)
    assert writer.report.bytes_needed >= 300 * 200 * 4
    moved = [event for event in events if isinstance(event, ckpt_cloud.BytesMoved)]
    assert sum(event.size_bytes for event in moved) == writer.report.bytes_moved >= 300 * 200 * 4
    assert {event.direction for event in moved} == {"up"}
    phases = [event.name for event in events if isinstance(event, ckpt_cloud.PhaseEnded)]
    assert phases == ["set up", "write", "commit"] == list(writer.report.phases)
    assert writer.report.seconds >= sum(writer.report.phases.values()) > 0

    reader = ObjectStoreReader(url)
    ckpt_cloud.load(state(-1), storage_reader=reader)
    assert reader.report.bytes_needed == writer.report.bytes_needed
    assert 1 <= reader.report.amplification < 1.1


def test_loading_logs_nothing_alarming(url, caplog):
    ckpt_cloud.save(state(), checkpoint_id=url)
    with caplog.at_level(logging.WARNING):
        check(url)
        with pytest.raises(CheckpointNotFound):
            ckpt_cloud.load(state(), checkpoint_id=f"{url}-not")
    assert [
        record for record in caplog.records if record.levelno >= logging.WARNING and "error" not in str(record.msg)
    ] == []


def test_a_second_asynchronous_save_waits_or_is_refused(store_faults):
    first, second, third = (f"memory://{secrets.token_hex(6)}/run/step-{n}" for n in range(3))
    store_faults.hang("put", key="*.safetensors")
    running = ckpt_cloud.async_save({"w": torch.ones(4)}, checkpoint_id=first, no_dist=True)
    with pytest.raises(SaveInFlight, match="still under way"):
        ckpt_cloud.async_save({"w": torch.ones(4)}, checkpoint_id=third, no_dist=True, in_flight="refuse")
    assert not running.done()
    threading.Timer(0.2, store_faults.release).start()
    waited = ckpt_cloud.async_save({"w": torch.zeros(4)}, checkpoint_id=second, no_dist=True)
    assert running.done(), "there is one staged copy at a time"
    waited.result()
    with pytest.raises(InvalidOption, match="in_flight"):
        ckpt_cloud.async_save({"w": torch.ones(4)}, checkpoint_id=third, no_dist=True, in_flight="skip")
    assert ckpt_cloud.latest(third.rpartition("/")[0]) is None
