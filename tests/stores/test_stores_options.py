"""Options are refused where they are made, and secrets neither shown nor pickled."""

import copy
import pickle

import fsspec
import pytest

from ckpt_cloud.errors import InvalidOption, MissingCredentials, Unsupported
from ckpt_cloud.options import KIB, MIB, CommitOptions, RetryOptions, StoreOptions, TransferOptions
from ckpt_cloud.stores import open_store, parse_url

SECRETS = {"access_key_id": "AKIAhunter2", "secret_access_key": "hunter2", "session_token": "hunter2token"}


@pytest.mark.parametrize(
    "make",
    [
        lambda: StoreOptions(access_key_id="a"),
        lambda: StoreOptions(secret_access_key="b"),
        lambda: StoreOptions(anonymous=True, access_key_id="a", secret_access_key="b"),
        lambda: StoreOptions(connect_timeout_s=0),
        lambda: StoreOptions(request_timeout_s=-1),
        lambda: StoreOptions(request_timeout_s="5"),
        lambda: StoreOptions(retry={"max_retries": 3}),
        lambda: RetryOptions(max_retries=-1),
        lambda: RetryOptions(deadline_s=0),
        lambda: RetryOptions(first_contact_s=0),
        lambda: RetryOptions(max_backoff_s=0),
        lambda: TransferOptions(part_size=5 * MIB - 1),
        lambda: TransferOptions(part_size=5 * MIB + 1),
        lambda: TransferOptions(part_size=5 << 30),
        lambda: TransferOptions(block_size=2 * KIB),
        lambda: TransferOptions(block_size=300 * KIB),
        lambda: TransferOptions(memory_budget=31 * MIB),
        lambda: TransferOptions(range_size=300 * MIB),
        lambda: TransferOptions(range_size=32 * KIB),
        lambda: TransferOptions(pack_size=15 * MIB),
        lambda: TransferOptions(max_requests=0),
        lambda: TransferOptions(gap_size=-1),
        lambda: TransferOptions(inline_limit=-1),
        lambda: CommitOptions(deadline_s=0),
        lambda: CommitOptions(pause_s=-1),
        lambda: CommitOptions(max_pause_s=0),
    ],
    ids=range(26),
)
def test_refused(make):
    with pytest.raises(InvalidOption) as refused:
        make()
    assert isinstance(refused.value, ValueError)
    assert "must" in str(refused.value) or "excludes" in str(refused.value) or "together" in str(refused.value)


def test_the_defaults_are_valid_and_small_ones_too():
    StoreOptions(), RetryOptions(), TransferOptions(), CommitOptions()
    TransferOptions(part_size=5 * MIB, memory_budget=10 * MIB, range_size=MIB, pack_size=5 * MIB, max_requests=1)


def test_secrets_are_not_shown():
    shown = f"{StoreOptions(**SECRETS)!r} {StoreOptions(**SECRETS)} {[StoreOptions(**SECRETS)]}"
    assert "hunter2" not in shown


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_has_no_secrets_and_says_so(protocol):
    options = StoreOptions(endpoint_url="http://host", region="mars-1", **SECRETS)
    pickled = pickle.dumps(options, protocol)
    assert b"hunter2" not in pickled

    got = pickle.loads(pickled)
    assert got == StoreOptions(endpoint_url="http://host", region="mars-1", secrets_dropped=got.secrets_dropped)
    assert set(got.secrets_dropped) == {"access_key_id", "secret_access_key", "session_token"}
    assert pickle.loads(pickle.dumps(got)).secrets_dropped, "nor does a second journey forget it"
    assert b"hunter2" not in pickle.dumps(copy.deepcopy(options))


def test_without_secrets_nothing_is_dropped():
    options = StoreOptions(profile="team", anonymous=True, retry=RetryOptions(max_retries=3))
    assert pickle.loads(pickle.dumps(options)) == options
    assert not pickle.loads(pickle.dumps(options)).secrets_dropped


def test_merged():
    base = StoreOptions(region="mars-1", endpoint_url="http://a")
    assert StoreOptions.merged(base, {"endpoint_url": "http://b"}) == StoreOptions(
        region="mars-1", endpoint_url="http://b"
    )
    assert StoreOptions.merged(None, {}) == StoreOptions()
    with pytest.raises(InvalidOption, match="endpoint"):
        StoreOptions.merged(None, {"endpoint": "http://b"})
    with pytest.raises(InvalidOption, match="go together"):
        StoreOptions.merged(None, {"access_key_id": "a"})
    with pytest.raises(InvalidOption):
        StoreOptions.merged(None, {"secrets_dropped": True})


def test_a_store_that_did_not_travel_is_not_replaced_by_another():
    """Without the filesystem the URL might mean another place."""
    fs = fsspec.filesystem("memory")
    for options in (StoreOptions(filesystem=fs), StoreOptions(engine="fsspec", filesystem_options={"x": 1})):
        open_store(parse_url("memory://x/run"), StoreOptions(filesystem=fs))
        with pytest.raises(Unsupported, match="not pickled into another process"):
            open_store(parse_url("memory://x/run"), pickle.loads(pickle.dumps(options)))
    options = StoreOptions(connection_string="AccountName=acme;AccountKey=aHVudGVyMg==")
    with pytest.raises(MissingCredentials, match="did not travel"):
        open_store(parse_url("az://container/run"), pickle.loads(pickle.dumps(options)))
