"""What a new user gets wrong, on each cloud and engine: told at once, with what to do next."""

import pytest

from ckpt_cloud.errors import CkptCloudError, FixRequest, MissingCredentials, StoreUnavailable
from ckpt_cloud.options import RetryOptions, StoreOptions
from ckpt_cloud.stores import open_store, parse_url

ONCE = RetryOptions(max_retries=0)
NOBODY = "http://127.0.0.1:9"
URLS = {"s3": "s3://bucket/run", "gcs": "gs://bucket/run", "azure": "az://bucket/run"}
KEYS = {
    "s3": {"access_key_id": "someone", "secret_access_key": "hunter2hunter2"},
    "gcs": {"access_token": "hunter2hunter2"},
    "azure": {"account_name": "acme", "account_key": "aHVudGVyMg=="},
}
ENDPOINTS = {"s3": "AWS_ENDPOINT_URL", "gcs": "STORAGE_EMULATOR_HOST", "azure": "AZURE_STORAGE_ENDPOINT"}


@pytest.fixture(params=URLS)
def cloud(request):
    return request.param


@pytest.fixture(params=["native", "fsspec"])
def opened(request, cloud):
    def opened(**options):
        return open_store(parse_url(URLS[cloud]), StoreOptions(engine=request.param, retry=ONCE, **options))

    return opened


@pytest.mark.parametrize("wrong", ["127.0.0.1:9", "localhost", "ftp://host", "http://", "http://two words"])
def test_an_endpoint_that_is_no_address(opened, cloud, wrong):
    if cloud == "gcs" and "://" not in wrong:
        pytest.skip("Google's own variable leaves out the scheme")
    with pytest.raises(FixRequest, match="is no address") as refused:
        opened(endpoint_url=wrong, **KEYS[cloud])
    assert "http[s]://host" in refused.value.hint


def test_an_endpoint_variable_that_is_no_address(opened, cloud, monkeypatch):
    monkeypatch.setenv(ENDPOINTS[cloud], "two words")
    if cloud == "azure":
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "acme")
    with pytest.raises(FixRequest, match="is no address"):
        opened(**({} if cloud == "azure" else KEYS[cloud]))


def test_a_proxy_that_is_no_address(opened, cloud):
    with pytest.raises(FixRequest, match="proxy_url") as refused:
        opened(proxy_url="someone:hunter2@proxy:80", **KEYS[cloud])
    assert "http[s]://host" in refused.value.hint


def test_a_ca_bundle_that_cannot_be_read(opened, cloud, tmp_path):
    (tmp_path / "no.pem").write_text("no certificate")
    for path in (tmp_path / "missing.pem", tmp_path / "no.pem"):
        with pytest.raises(FixRequest, match=path.name) as refused:
            opened(ca_bundle=str(path), **KEYS[cloud])
        assert "ca_bundle" in refused.value.hint


async def test_a_server_that_is_not_there_is_named(opened, cloud):
    with pytest.raises(StoreUnavailable, match=r"no answer") as failure:
        await opened(endpoint_url=f"{NOBODY}/acme" if cloud == "azure" else NOBODY, **KEYS[cloud]).get("k", limit=1)
    assert "refused" in failure.value.message
    assert "127.0.0.1:9" in f"{failure.value.message} {failure.value.__notes__}"
    assert "endpoint" in failure.value.hint
    assert "hunter2" not in f"{failure.value} {failure.value.__notes__}"


async def test_a_host_that_nobody_knows(opened, cloud):
    endpoint = "http://no-such-host.invalid"
    with pytest.raises(StoreUnavailable, match="no such host"):
        await opened(endpoint_url=endpoint, **KEYS[cloud]).get("k", limit=1)


async def test_no_credentials_says_where_they_come_from(opened, cloud, monkeypatch, tmp_path):
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    with pytest.raises(MissingCredentials) as missing:
        await opened().get("k", limit=1)
    own = {"s3": "AWS_", "gcs": "GOOGLE_", "azure": "AZURE_"}
    assert own.pop(cloud) in missing.value.hint
    assert not any(other in missing.value.hint for other in own.values()), "nothing of other clouds"


@pytest.mark.parametrize("engine", ["native", "fsspec"])
def test_an_azure_key_that_was_cut_off(engine):
    options = StoreOptions(account_name="acme", account_key="hunter2!", engine=engine)
    with pytest.raises(FixRequest, match="Base64") as refused:
        open_store(parse_url("az://container/run"), options)
    assert "hunter2" not in f"{refused.value!r}"


@pytest.mark.parametrize("engine", ["native", "fsspec"])
def test_a_google_file_that_is_not_there(engine, monkeypatch):
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/no/such/key.json")
    with pytest.raises(FixRequest, match=r"/no/such/key\.json"):
        open_store(parse_url("gs://bucket/run"), StoreOptions(engine=engine))


def test_every_refusal_is_one_of_ours(opened):
    with pytest.raises(CkptCloudError):
        opened(profile="no-such-profile", connection_string="nonsense", credentials_file="/no/such/file")
