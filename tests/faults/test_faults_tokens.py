"""Where Azure's and Google's tokens come from on each engine: who asks, through which proxy, and that they are used."""

import contextlib
import json
import ssl

import aiohttp
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from ckpt_cloud.errors import CkptCloudError
from ckpt_cloud.options import RetryOptions, StoreOptions
from ckpt_cloud.stores import open_store, parse_url
from tests.faults import server as faults
from tests.faults.certificates import certificate
from tests.faults.dialect import Answer
from tests.faults.server import FaultServer

pytestmark = pytest.mark.timeout(60)

TOKEN = "hunter2.hunter2"
ONCE = RetryOptions(max_retries=0)


def says(content):
    body = json.dumps(content).encode()
    return lambda exchange: exchange.send(Answer(200, body, {"Content-Type": "application/json"}))


@pytest.fixture
def trusted(tmp_path, monkeypatch, nobodys_cloud):
    """Makes a server that the token libraries trust by the variables of theirs, whatever name they know it by."""
    with contextlib.ExitStack() as stack:

        def trusted(name):
            cert, key = certificate(tmp_path, name)
            server = stack.enter_context(FaultServer(tls=faults.server_context(cert, key)))
            server.cert = str(cert)
            monkeypatch.setenv("REQUESTS_CA_BUNDLE", server.cert)
            # aiohttp reads SSL_CERT_FILE once, when it is imported.
            context = ssl.create_default_context(cafile=server.cert)
            monkeypatch.setattr(aiohttp.connector, "_SSL_CONTEXT_VERIFIED", context)
            return server

        yield trusted


PRINCIPALS = {
    "environment": {"AZURE_CLIENT_ID": "saver", "AZURE_TENANT_ID": "adfs", "AZURE_CLIENT_SECRET": "s"},
    "adlfs": {
        "AZURE_STORAGE_CLIENT_ID": "saver",
        "AZURE_STORAGE_TENANT_ID": "adfs",
        "AZURE_STORAGE_CLIENT_SECRET": "s",
    },
    "workload": {"AZURE_CLIENT_ID": "saver", "AZURE_TENANT_ID": "adfs", "AZURE_FEDERATED_TOKEN_FILE": "the-file"},
}


@pytest.fixture(params=PRINCIPALS)
def principal(request, monkeypatch, tmp_path):
    """Of a directory of one's own (AD FS), since nobody asks Microsoft about such a one first."""
    (tmp_path / "the-file").write_text("the-pods-token")
    for name, value in PRINCIPALS[request.param].items():
        monkeypatch.setenv(name, str(tmp_path / value) if value == "the-file" else value)
    return request.param


def issue(server, address):
    """Has `server` know itself as `address`."""
    endpoints = {name: f"{address}/adfs/oauth2/{name}" for name in ("token_endpoint", "authorization_endpoint")}
    server.fault(says({**endpoints, "issuer": f"{address}/adfs"}), method="GET", key=".well-known/*")
    grant = {"access_token": TOKEN, "expires_in": 3600, "token_type": "Bearer"}
    server.fault(says(grant), method="POST", key="oauth2/*")


def asked_for_tokens(server):
    return [request for request in server.requests if "oauth2" in request.target or request.key.startswith("token")]


def bearers(server):
    return {request.headers.get("authorization") for request in server.requests if request.bucket == "bucket"}


async def save(url, **options):
    """As far as the server understands it."""
    with contextlib.suppress(CkptCloudError):
        await open_store(parse_url(url), StoreOptions(retry=ONCE, **options)).put("k", b"x")


async def test_an_azure_identity(trusted, principal, engine, monkeypatch):
    server = trusted("127.0.0.1")
    issue(server, server.url)
    monkeypatch.setenv("AZURE_AUTHORITY_HOST", server.url)
    await save("az://bucket/run", account_name="acme", endpoint_url=server.url, ca_bundle=server.cert, engine=engine)
    (asked,) = asked_for_tokens(server)
    assert b"client_id=saver" in asked.body
    proof = b"client_assertion=the-pods-token" if principal == "workload" else b"client_secret=s"
    assert proof in asked.body
    assert bearers(server) == {f"Bearer {TOKEN}"}


async def test_an_azure_identity_through_a_proxy(trusted, engine, monkeypatch):
    for name, value in PRINCIPALS["environment"].items():
        monkeypatch.setenv(name, value)
    server = trusted("login.example.test")
    issue(server, "https://login.example.test")
    monkeypatch.setenv("AZURE_AUTHORITY_HOST", "https://login.example.test")
    with FaultServer() as proxy:
        proxy.tunnel_to = server
        store = {"account_name": "acme", "endpoint_url": "https://acme.example.test", "ca_bundle": server.cert}
        await save("az://bucket/run", proxy_url=proxy.url, engine=engine, **store)
        assert "login.example.test:443" in proxy.tunnels
    assert len(asked_for_tokens(server)) == 1


@pytest.fixture
def service_account(tmp_path):
    """Writes a service account's file whose tokens come from `address`."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    form = serialization.PrivateFormat.PKCS8
    pem = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()).decode()

    def service_account(address):
        path = tmp_path / "key.json"
        info = {
            "type": "service_account",
            "project_id": "acme",
            "private_key": pem,
            "client_email": "saver@acme.iam.gserviceaccount.com",
            "token_uri": f"{address}/tokens/token",
        }
        path.write_text(json.dumps(info))
        return str(path)

    return service_account


@pytest.mark.parametrize("how", ["direct", "argument", "environment"])
async def test_a_google_service_account(trusted, service_account, engine, how, monkeypatch):
    server = trusted("127.0.0.1" if how == "direct" else "oauth2.example.test")
    server.fault(says({"access_token": TOKEN, "expires_in": 3600, "token_type": "Bearer"}), key="token")
    with FaultServer() as proxy:
        proxy.tunnel_to = server
        options = {"proxy_url": proxy.url} if how == "argument" else {}
        if how == "environment":
            monkeypatch.setenv("HTTPS_PROXY", proxy.url)
            monkeypatch.setenv("https_proxy", proxy.url)
        address = server.url if how == "direct" else "https://oauth2.example.test"
        store = {"endpoint_url": address, "ca_bundle": server.cert, "credentials_file": service_account(address)}
        await save("gs://bucket/run", engine=engine, **store, **options)
        assert set(proxy.tunnels) == (set() if how == "direct" else {"oauth2.example.test:443"})
    (asked,) = asked_for_tokens(server)
    assert b"assertion=" in asked.body
    used = {request.headers.get("authorization") for request in server.requests if request is not asked}
    assert used == {f"Bearer {TOKEN}"}
