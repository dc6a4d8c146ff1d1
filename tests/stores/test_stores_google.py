"""Where Google's credentials and endpoint come from, as Google's own libraries find them."""

import json
from datetime import UTC, datetime, timedelta

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from ckpt_cloud.errors import FixRequest, MissingCredentials
from ckpt_cloud.options import StoreOptions
from ckpt_cloud.stores import google_settings, open_store, parse_url

URL = "gs://bucket/run"


@pytest.fixture(scope="module")
def key_file(tmp_path_factory):
    """A service account's file, as Google gives it out."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
    path = tmp_path_factory.mktemp("google") / "key.json"
    info = {
        "type": "service_account",
        "project_id": "acme",
        "private_key_id": "1",
        "private_key": pem,
        "client_email": "saver@acme.iam.gserviceaccount.com",
        "client_id": "1",
        "token_uri": "https://oauth2.googleapis.com/token",
    }
    path.write_text(json.dumps(info))
    return path


@pytest.fixture(autouse=True)
def no_home(monkeypatch, tmp_path):
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path / "no-gcloud"))


def found(**options):
    return google_settings.credentials(StoreOptions(**options), URL)


def test_application_default_credentials(key_file, monkeypatch):
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(key_file))
    assert found().service_account_email == "saver@acme.iam.gserviceaccount.com"
    assert found().scopes == [google_settings.SCOPE]


def test_a_file_that_is_named(key_file):
    assert found(credentials_file=str(key_file)).project_id == "acme"


def test_a_token():
    provider = google_settings.CredentialProvider(found(access_token="hunter2"))
    assert provider() == {"token": "hunter2", "expires_at": None}


def test_a_token_that_runs_out_is_renewed():
    class Refreshing:
        valid, token, expiry = False, "old", None

        def refresh(self, request):
            self.valid, self.token = True, "new"
            # Google's library keeps naive times that mean UTC.
            self.expiry = (datetime.now(UTC) + timedelta(hours=1)).replace(tzinfo=None)

    given = google_settings.CredentialProvider(Refreshing())()
    assert given["token"] == "new"
    assert timedelta(minutes=50) < given["expires_at"] - datetime.now(UTC) < timedelta(hours=2)


@pytest.mark.parametrize("engine", ["native", "fsspec"])
def test_no_credentials_anywhere(engine):
    with pytest.raises(MissingCredentials) as missing:
        open_store(parse_url(URL), StoreOptions(engine=engine))
    assert "gcloud auth application-default login" in missing.value.hint
    assert missing.value.url == URL


@pytest.mark.parametrize("engine", ["native", "fsspec"])
def test_a_file_that_is_no_key(tmp_path, engine):
    nonsense = tmp_path / "key.json"
    nonsense.write_text('{"hunter2": 1}')
    for path in (nonsense, tmp_path / "missing.json"):
        with pytest.raises(FixRequest, match=path.name) as wrong:
            open_store(parse_url(URL), StoreOptions(credentials_file=str(path), engine=engine))
        assert "hunter2" not in f"{wrong.value!r}"


def test_the_emulator(monkeypatch):
    assert google_settings.endpoint_url(StoreOptions(), URL) is None
    assert not google_settings.unsigned(StoreOptions())
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "127.0.0.1:4443/")
    assert google_settings.endpoint_url(StoreOptions(), URL) == "http://127.0.0.1:4443"
    assert google_settings.unsigned(StoreOptions())
    assert not google_settings.unsigned(StoreOptions(access_token="t"))
    assert google_settings.endpoint_url(StoreOptions(endpoint_url="http://other:1"), URL) == "http://other:1"
    for engine in ("native", "fsspec"):
        open_store(parse_url(URL), StoreOptions(engine=engine))


def payer_of(engine):
    """The project that the engine's requests name."""
    store = open_store(parse_url(URL), StoreOptions(engine=engine, access_token="t", requester_pays=True))._store
    if engine == "fsspec":
        return store._fs._get_params({})["userProject"]
    return store._clients.reads.client_options["default_headers"]["x-goog-user-project"]


@pytest.mark.parametrize("engine", ["native", "fsspec"])
def test_who_pays_is_in_the_environment(monkeypatch, engine):
    with pytest.raises(FixRequest, match="requester_pays without a project") as unnamed:
        payer_of(engine)
    assert "GOOGLE_CLOUD_PROJECT" in unnamed.value.hint
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "acme")
    assert payer_of(engine) in ("acme", b"acme")
