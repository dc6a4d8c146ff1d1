"""Where Azure's account, key and endpoint come from, as Microsoft's own tools find them; and how URLs name them."""

import datetime as dt
import pickle
import secrets

import pytest
from azure.storage.blob import BlobServiceClient, ContainerSasPermissions, generate_container_sas

from ckpt_cloud import bridge
from ckpt_cloud.errors import FixRequest, InvalidOption, InvalidURL, MissingCredentials, PermissionDenied
from ckpt_cloud.options import StoreOptions
from ckpt_cloud.stores import open_store, parse_url
from ckpt_cloud.stores.azure_settings import account

KEY = "aHVudGVyMg=="
STRING = f"DefaultEndpointsProtocol=https;AccountName=acme;AccountKey={KEY};EndpointSuffix=core.windows.net"


def found(url="az://container/run", **options):
    return account(parse_url(url), StoreOptions(**options))


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_a_connection_string(how, monkeypatch):
    if how == "environment":
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", STRING)
        acme = found()
    else:
        acme = found(connection_string=STRING)
    assert (acme.name, acme.key, acme.sas) == ("acme", KEY, None)
    assert acme.endpoint == "https://acme.blob.core.windows.net"
    assert KEY not in repr(acme)


def test_azure_agrees_about_the_endpoint():
    for string in (
        STRING,
        f"{STRING};BlobEndpoint=http://127.0.0.1:10000/acme",
        "BlobEndpoint=https://acme.blob.core.chinacloudapi.cn/;SharedAccessSignature=sv=1&sig=x",
        STRING.replace("core.windows.net", "core.chinacloudapi.cn"),
    ):
        theirs = BlobServiceClient.from_connection_string(string)
        ours = found(connection_string=string)
        assert ours.endpoint == theirs.url.partition("?")[0].rstrip("/")
        assert ours.name == theirs.account_name


def test_the_emulator():
    emulator = found(connection_string="UseDevelopmentStorage=true")
    assert (emulator.name, emulator.endpoint) == ("devstoreaccount1", "http://127.0.0.1:10000/devstoreaccount1")


def test_single_variables(monkeypatch):
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "acme")
    assert (found().name, found().key, found().sas) == ("acme", None, None)
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", "?sv=1&sig=x")
    assert found().sas == "?sv=1&sig=x"
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", KEY)
    assert found().key == KEY


def test_arguments_win(monkeypatch):
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", STRING)
    other = found(account_name="other", account_key="b3RoZXI=")
    assert (other.name, other.key, other.endpoint) == ("other", "b3RoZXI=", "https://other.blob.core.windows.net")
    assert found(endpoint_url="http://127.0.0.1:1/acme").endpoint == "http://127.0.0.1:1/acme"
    assert found(sas_token="sv=1").key is None


def test_a_key_of_another_account_is_not_used(monkeypatch):
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "acme")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", KEY)
    assert found(account_name="other").key is None


@pytest.mark.parametrize(
    ("url", "endpoint"),
    [
        ("abfs://container@acme.dfs.core.windows.net/run", "https://acme.blob.core.windows.net"),
        ("abfss://container@acme.dfs.core.windows.net/run", "https://acme.blob.core.windows.net"),
        ("abfss://container@acme.blob.core.chinacloudapi.cn/run", "https://acme.blob.core.chinacloudapi.cn"),
        ("abfs://container@acme/run", "https://acme.blob.core.windows.net"),
    ],
)
def test_the_account_in_the_url(url, endpoint):
    assert found(url).endpoint == endpoint
    location = parse_url(url)
    assert (location.bucket, location.path, location.url, location.dialect) == ("container", "run", url, "azure")
    assert location.child("x").url == f"{url}/x"


def test_two_accounts_at_once_are_refused():
    with pytest.raises(FixRequest, match="account other, the configuration acme") as refused:
        found("abfs://container@other.dfs.core.windows.net/run", connection_string=STRING)
    assert KEY not in f"{refused.value!r}"


def test_no_account_anywhere():
    with pytest.raises(MissingCredentials) as missing:
        open_store(parse_url("az://container/run"), StoreOptions())
    assert "AZURE_STORAGE_CONNECTION_STRING" in missing.value.hint


def test_nonsense():
    with pytest.raises(FixRequest, match="connection string") as nonsense:
        found(connection_string=f"hello {KEY[:4]}")
    assert KEY[:4] not in f"{nonsense.value!r}"
    for url in ("az:///run", "az://user@container/run", "abfs://a@b@c/run", "abfs://container@acme.net/run?sig=x"):
        with pytest.raises(InvalidURL):
            parse_url(url)
    with pytest.raises(InvalidOption, match="account_key"):
        StoreOptions(anonymous=True, account_key=KEY)


@pytest.mark.parametrize("engine", ["native", "fsspec"])
@pytest.mark.parametrize("key", [KEY[2:], KEY + "==", "no key at all", KEY.rstrip("=")])
def test_a_key_that_was_not_copied_whole(key, engine):
    if key == KEY:
        return
    with pytest.raises(FixRequest, match="not Base64") as broken:
        open_store(parse_url("az://container/run"), StoreOptions(account_name="acme", account_key=key, engine=engine))
    assert key not in f"{broken.value!r}"


def test_secrets_are_neither_shown_nor_pickled():
    options = StoreOptions(connection_string=STRING, account_key=KEY, sas_token="sig=hunter2", access_token="hunter2")
    assert KEY not in repr(options)
    assert "hunter2" not in repr(options)
    data = pickle.dumps(options)
    assert KEY.encode() not in data
    assert b"hunter2" not in data
    assert pickle.loads(data).secrets_dropped


@pytest.fixture
def container(azurite):
    name = f"container-{secrets.token_hex(4)}"
    azurite.create_bucket(name)
    return name


def roundtrip(url, **options):
    store = open_store(parse_url(url), StoreOptions(**options))
    bridge.run(store.put("k", b"x"))
    return bridge.run(store.get("k", limit=1))[0]


def sas(azurite, container, **permissions):
    parts = dict(part.split("=", 1) for part in azurite.env["AZURE_STORAGE_CONNECTION_STRING"].split(";"))
    return generate_container_sas(
        parts["AccountName"],
        container,
        parts["AccountKey"],
        permission=ContainerSasPermissions(**permissions),
        expiry=dt.datetime.now(dt.UTC) + dt.timedelta(hours=1),
    )


def test_a_sas_token_on_a_server(azurite, container):
    token = sas(azurite, container, read=True, write=True, create=True, list=True, delete=True)
    for given in (token, f"?{token}"):
        options = {"sas_token": given, "endpoint_url": azurite.endpoint_url, "account_name": "devstoreaccount1"}
        assert roundtrip(f"az://{container}/run", **options) == b"x"


def test_a_sas_token_that_may_only_read(azurite, container):
    token = sas(azurite, container, read=True)
    options = {"sas_token": token, "endpoint_url": azurite.endpoint_url, "account_name": "devstoreaccount1"}
    with pytest.raises(PermissionDenied) as refused:
        roundtrip(f"az://{container}/run", **options)
    signature = token.split("sig=")[1][:12]
    assert signature not in f"{refused.value!r} {refused.value} {refused.value.__notes__}"


def test_the_identity_when_there_is_no_key(azurite, container, monkeypatch):
    """DefaultAzureCredential is asked, and what it cannot do is said."""
    import azure.identity

    asked = []

    class Nobody:
        def get_token(self, *scopes, **_):
            asked.append(scopes)
            raise azure.identity.CredentialUnavailableError("nobody is logged in")

    monkeypatch.setattr(azure.identity, "DefaultAzureCredential", Nobody)
    options = {"account_name": "devstoreaccount1", "endpoint_url": azurite.endpoint_url}
    with pytest.raises(MissingCredentials) as missing:
        roundtrip(f"az://{container}/run", **options)
    assert asked == [("https://storage.azure.com/.default",)]
    assert "AZURE_STORAGE" in missing.value.hint
