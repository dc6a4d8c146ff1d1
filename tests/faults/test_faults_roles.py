"""Roles, web identity and SSO on each engine, against servers: who asks, and whose keys sign what the store gets."""

import hashlib
import json
import secrets
import threading
import urllib.parse
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from botocore.credentials import SSOProvider
from botocore.tokens import SSOTokenProvider

from ckpt_cloud.errors import CkptCloudError, MissingCredentials, PermissionDenied, TryAgain
from ckpt_cloud.options import RetryOptions, StoreOptions
from ckpt_cloud.stores import open_store, parse_url

MIB = 1 << 20
ROLE = "arn:aws:iam::123456789012:role/saver"
ONCE = RetryOptions(max_retries=0)


class TokenServer:
    """STS and the portal of SSO: each answer has the next key, which is valid for `valid_s`."""

    def __init__(self):
        self.asked = []
        self.valid_s = 3600.0
        self.refuses = False
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"])).decode()
                outer.asked.append(dict(urllib.parse.parse_qsl(body)))
                self.answer(403 if outer.refuses else 200, "text/xml", outer.assumed(outer.asked[-1]["Action"]))

            def do_GET(self):
                query = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(self.path).query))
                outer.asked.append({**query, "token": self.headers["x-amz-sso_bearer_token"]})
                self.answer(401 if outer.refuses else 200, "application/json", json.dumps(outer.granted()))

            def answer(self, status, kind, text):
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *args):
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def assumed(self, action):
        if self.refuses:
            return "<ErrorResponse><Error><Code>AccessDenied</Code><Message>no</Message></Error></ErrorResponse>"
        until = (datetime.now(UTC) + timedelta(seconds=self.valid_s)).strftime("%Y-%m-%dT%H:%M:%SZ")
        return (
            f"<{action}Response><{action}Result><Credentials><AccessKeyId>role-{len(self.asked)}</AccessKeyId>"
            f"<SecretAccessKey>hunter2hunter2</SecretAccessKey><SessionToken>t</SessionToken>"
            f"<Expiration>{until}</Expiration></Credentials></{action}Result></{action}Response>"
        )

    def granted(self):
        if self.refuses:
            return {"message": "Session token not found or invalid"}
        until = int((datetime.now(UTC) + timedelta(seconds=self.valid_s)).timestamp() * 1000)
        keys = {"accessKeyId": f"sso-{len(self.asked)}", "secretAccessKey": "hunter2hunter2", "sessionToken": "t"}
        return {"roleCredentials": {**keys, "expiration": until}}


@pytest.fixture
def tokens():
    with TokenServer() as server:
        yield server


@pytest.fixture
def as_role(monkeypatch, tmp_path, server, tokens):
    """The AWS config of a user who gets a role in one of the ways; the store is the fault server."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for service in ("STS", "SSO"):
        monkeypatch.setenv(f"AWS_ENDPOINT_URL_{service}", tokens.url)
    # Both are settled when botocore is imported.
    for kind in (SSOProvider, SSOTokenProvider):
        monkeypatch.setattr(kind, "_SSO_TOKEN_CACHE_DIR", str(tmp_path))

    def as_role(how):
        config = tmp_path / "config"
        monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
        if how == "role":
            config.write_text(
                f"[default]\nrole_arn = {ROLE}\nsource_profile = base\nrole_session_name = saving\n"
                "[profile base]\naws_access_key_id = base\naws_secret_access_key = s\n"
            )
        elif how == "web-identity":
            (tmp_path / "token").write_text("a-web-token")
            monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
            monkeypatch.setenv("AWS_ROLE_ARN", ROLE)
            config.write_text("")
        else:
            config.write_text(
                "[default]\nsso_session = work\nsso_account_id = 1\nsso_role_name = saver\n"
                "[sso-session work]\nsso_start_url = https://acme.example/start\nsso_region = us-east-1\n"
            )
            until = (datetime.now(UTC) + timedelta(hours=1 if how == "sso" else -1)).strftime("%Y-%m-%dT%H:%M:%SZ")
            name = hashlib.sha1(b"work").hexdigest()
            (tmp_path / f"{name}.json").write_text(json.dumps({"accessToken": "an-sso-token", "expiresAt": until}))

    return as_role


@pytest.fixture(params=["native", "fsspec"])
def opened(request):
    return lambda **options: open_store(parse_url("s3://bucket/p"), StoreOptions(engine=request.param, **options))


def keys(requests):
    return {request.headers["authorization"].split("Credential=")[1].split("/")[0] for request in requests}


def stream(*buffers):
    async def source():
        for buffer in buffers:
            yield buffer

    return source


@pytest.mark.parametrize("how", ["role", "web-identity", "sso"])
async def test_the_keys_of_a_role_sign_what_is_sent(server, tokens, as_role, opened, how):
    as_role(how)
    store = opened()
    await store.put("k", b"x")
    assert (await store.get("k", limit=1))[0] == b"x"
    assert await store.list_uploads() == []
    assert {key.rstrip("0123456789") for key in keys(server.requests)} == {"sso-" if how == "sso" else "role-"}
    assert server.requests[0].headers["x-amz-security-token"] == "t"
    wanted = {
        "role": {"Action": "AssumeRole", "RoleArn": ROLE},
        "web-identity": {"Action": "AssumeRoleWithWebIdentity", "WebIdentityToken": "a-web-token"},
        "sso": {"role_name": "saver", "account_id": "1", "token": "an-sso-token"},
    }
    assert wanted[how].items() <= tokens.asked[0].items()


@pytest.mark.parametrize("how", ["role", "web-identity", "sso"])
async def test_keys_that_run_out_in_the_middle_of_an_upload_are_renewed(server, tokens, as_role, opened, how):
    as_role(how)
    tokens.valid_s = 30
    store = opened()

    await store.put_multipart("k", stream(*[secrets.token_bytes(5 * MIB)] * 4), part_size=5 * MIB, concurrency=1)
    assert len(keys(request for request in server.requests if "partNumber" in request.query)) > 1


@pytest.mark.parametrize("how", ["role", "web-identity", "sso", "sso-that-ended"])
async def test_a_role_that_is_refused(server, tokens, as_role, opened, how):
    as_role(how)
    tokens.refuses = True
    with pytest.raises((MissingCredentials, PermissionDenied)) as refused:
        await opened(retry=ONCE).put("k", b"x")
    assert "AWS_PROFILE" in refused.value.hint
    if "sso" in how:
        assert "aws sso login" in refused.value.hint
    assert server.requests == []
    assert not isinstance(refused.value, TryAgain)


@pytest.mark.parametrize("how", ["role", "web-identity"])
async def test_a_proxy_is_also_for_asking_for_the_role(server, tokens, as_role, opened, how, monkeypatch):
    """The token server takes a proxy's requests too: nobody else answers for that name."""
    as_role(how)
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", "http://sts.example.test")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://s3.example.test")
    with pytest.raises(CkptCloudError):
        await opened(proxy_url=tokens.url, retry=ONCE).put("k", b"x")
    assert tokens.asked[0]["RoleArn"] == ROLE
