"""No secret in anything that comes out: messages, notes, causes, tracebacks with locals, logs, pickles, objects."""

import base64
import logging
import pickle
import secrets
import socket
import traceback
from xml.sax.saxutils import escape

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

import ckpt_cloud
from ckpt_cloud import CommitOptions, ObjectStoreReader, ObjectStoreWriter, RetryOptions, StoreOptions
from ckpt_cloud.errors import CkptCloudError, InvalidOption
from tests.faults import server as faults
from tests.faults.dialect import Answer
from tests.faults.server import FaultServer

pytestmark = pytest.mark.timeout(120)

KEY = Ed25519PrivateKey.from_private_bytes(b"MARKEDMARKEDMARKEDMARKEDMARKED!!")
PEM = KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
CUSTOMER_KEY = base64.b64encode(b"MARKEDMARKEDMARKEDMARKEDMARKED!!").decode()
QUICK = RetryOptions(max_retries=0, deadline_s=5, first_contact_s=2, max_backoff_s=0.05)
COMMIT = CommitOptions(deadline_s=1, pause_s=0.05, max_pause_s=0.1)
ENCRYPTION_KEY = b"MARKEDMARKEDMARKEDMARKEDMARKED!!"
MARKS = (
    b"MARKED".hex(),
    "MARKED",
    "marked",
    CUSTOMER_KEY[:20],
    base64.b64encode(b"MARKED").decode()[:7],
    PEM.decode().split("\n")[1][:20],
)
SECRETS = {
    "access_key_id": "AKIAMARKEDMARKED",
    "secret_access_key": "MARKED/secret+key",
    "session_token": "MARKED-session-token",
    "access_token": "ya29.MARKED",
    "account_key": base64.b64encode(b"MARKED account key").decode(),
    "sas_token": "sv=2024-01-01&sig=MARKEDsas%3D",
    "connection_string": "DefaultEndpointsProtocol=http;AccountName=a;AccountKey=TUFSS0VE",
    "sse_customer_key": CUSTOMER_KEY,
    "filesystem_options": {"secret": "MARKED"},
}


def all_that_is_said(error, locals_too):
    """An error in every way in which somebody may print or send it."""
    said = [repr(pickle.dumps(error))]
    for with_locals in {False, locals_too}:
        shown = traceback.TracebackException.from_exception(error, capture_locals=with_locals)
        said.append("".join(shown.format()))
    while error is not None:
        said += [str(error), repr(error), repr(error.args), repr(vars(error)), *getattr(error, "__notes__", [])]
        error = error.__cause__
    return "\n".join(said)


def assert_secret_free(text, where):
    for mark in MARKS:
        at = text.find(mark)
        assert at < 0, f"{mark!r} in {where}: ...{text[max(0, at - 200) : at + 60]}..."


@pytest.fixture
def said(caplog, capfd):
    """Collects errors; at the end all of them, and all logs and output, are searched."""
    caplog.set_level(logging.INFO)
    caplog.set_level(logging.DEBUG, logger="ckpt_cloud")
    errors = []
    yield errors
    for error, locals_too in errors:
        assert_secret_free(all_that_is_said(error, locals_too), type(error).__name__)
    assert_secret_free(caplog.text, "the logs")
    out, err = capfd.readouterr()
    assert_secret_free(out + err, "the output")


def attempt(url, said, *, locals_too=True, **options):
    """Saves, loads and verifies, and collects what is raised.

    Not its locals where the store repeats secrets, since among them are the store's own words.
    """
    options = {"retry": QUICK, **options}
    for call in (_save, _load, _verify):
        try:
            call(url, options)
        except CkptCloudError as error:
            # From the first frame of ours on: a test's own locals hold the secrets.
            said.append((error.with_traceback(_ours(error.__traceback__)), locals_too))
    return said


def _ours(tb):
    while tb is not None and "/ckpt_cloud/" not in tb.tb_frame.f_code.co_filename:
        tb = tb.tb_next
    # A constructor is given the secrets as arguments, which are its locals.
    return None if tb is not None and tb.tb_frame.f_code.co_name == "__init__" else tb


def _save(url, options):
    ckpt_cloud.save({"w": torch.ones(5)}, storage_writer=ObjectStoreWriter(url, commit=COMMIT, **options), no_dist=True)


def _load(url, options):
    ckpt_cloud.load({"w": torch.ones(5)}, storage_reader=ObjectStoreReader(url, **options), no_dist=True)


def _verify(url, options):
    ckpt_cloud.verify(url, store=StoreOptions(**options))


def echo(status):
    """A server that says back all that it was told, as some do when a signature is wrong."""

    def act(exchange):
        told = escape("\n".join(f"{name}:{value}" for name, value in exchange.request.headers.items()))
        query = escape(str(exchange.request.query))
        body = (
            "<Error><Code>SomethingNew</Code><Message>The signature is wrong.</Message>"
            f"<StringToSign>{query}</StringToSign><CanonicalRequest>{told}\n{query}</CanonicalRequest></Error>"
        )
        exchange.send(Answer(status, body.encode(), {"Content-Type": "application/xml"}))

    return act


ACTS = {
    "denied": faults.refuse(403, "AccessDenied", "<AWSAccessKeyId>AKIAMARKEDMARKED</AWSAccessKeyId>"),
    "signature": faults.refuse(403, "SignatureDoesNotMatch", "<StringToSign>MARKED-session-token</StringToSign>"),
    "echo-400": echo(400),
    "echo-403": echo(403),
    "echo-500": echo(500),
    "no-bucket": faults.refuse(404, "NoSuchBucket"),
    "page": faults.page(502),
    "reset": faults.reset,
    "throttled": faults.refuse(503, "SlowDown"),
}


REPEATS = {"denied", "signature", "echo-400", "echo-403", "echo-500"}


@pytest.fixture
def server():
    with FaultServer() as server:
        server.create_bucket("bucket")
        yield server


@pytest.mark.parametrize("engine", ["native", pytest.param("fsspec", marks=pytest.mark.slow)])
@pytest.mark.parametrize("given", ["environment", "options"])
@pytest.mark.parametrize("act", ACTS)
def test_s3(server, monkeypatch, said, act, given, engine):
    names = {name: SECRETS[name] for name in ("access_key_id", "secret_access_key", "session_token")}
    if given == "environment":
        for name, value in names.items():
            monkeypatch.setenv(f"AWS_{name.upper()}", value)
        names = {}
    server.fault(ACTS[act])
    where = {"endpoint_url": server.url, "region": "r", "engine": engine}
    attempt(f"s3://bucket/{secrets.token_hex(4)}", said, locals_too=act not in REPEATS, **where, **names)
    assert len(said) == 3


@pytest.mark.parametrize("method", ["PUT", "GET"])
def test_s3_with_a_customer_key(server, said, method):
    server.fault(echo(400), method=method)
    names = ("access_key_id", "secret_access_key", "sse_customer_key")
    keys = {name: SECRETS[name] for name in names}
    attempt("s3://bucket/run", said, locals_too=False, endpoint_url=server.url, region="r", **keys)
    assert said


@pytest.fixture
def nobody():
    """An endpoint where nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.mark.parametrize("secret", ["account_key", "sas_token"])
@pytest.mark.parametrize("engine", ["native", "fsspec"])
@pytest.mark.parametrize("where", ["nobody", "server"])
def test_azure(request, said, where, engine, secret, server, nobody):
    if engine == "fsspec":
        pytest.importorskip("adlfs")
    server.fault(echo(403))
    endpoint = nobody if where == "nobody" else server.url
    attempt(
        "az://bucket/run",
        said,
        locals_too=where == "nobody",
        endpoint_url=f"{endpoint}/acct",
        account_name="acct",
        engine=engine,
        **{secret: SECRETS[secret]},
    )
    assert said


def test_azure_by_a_connection_string(said, monkeypatch, nobody):
    text = f"DefaultEndpointsProtocol=http;AccountName=a;AccountKey={SECRETS['account_key']};BlobEndpoint={nobody}/a"
    attempt("az://bucket/run", said, connection_string=text)
    sas = f"BlobEndpoint={nobody}/a;SharedAccessSignature={SECRETS['sas_token']}"
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", sas)
    attempt("az://bucket/run", said)
    assert said


@pytest.mark.parametrize("engine", ["native", "fsspec"])
def test_google(said, nobody, engine):
    if engine == "fsspec":
        pytest.importorskip("gcsfs")
    attempt("gs://bucket/run", said, endpoint_url=nobody, access_token=SECRETS["access_token"], engine=engine)
    assert said


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIAMARKED:MARKED/secret@bucket/run",
        "s3://bucket/run?X-Amz-Signature=MARKED&X-Amz-Credential=MARKED",
        "https://bucket.s3.amazonaws.com/run?X-Amz-Signature=MARKED",
        "https://account.blob.core.windows.net/c/run?sv=2024&sig=MARKED",
        "az://container/run?sig=MARKED",
        "abfss://container@account.dfs.core.windows.net/run?sig=MARKED",
        "gs://bucket/run?GoogleAccessId=x&Signature=MARKED",
        "nosuch://user:MARKED@host/x?token=MARKED",
        "http://user:MARKED@127.0.0.1:1/x",
    ],
)
def test_urls(said, url):
    attempt(url, said, region="r", anonymous=True)
    assert said
    # The URL is an argument, and so a local, of every frame.
    said[:] = [(error.with_traceback(None), False) for error, _ in said]


def test_options_and_plug_ins_show_and_carry_none():
    for name, value in SECRETS.items():
        pair = {name: value}
        if name in ("access_key_id", "secret_access_key"):
            pair = {key: SECRETS[key] for key in ("access_key_id", "secret_access_key")}
        options = StoreOptions(**pair)
        for holder in (
            options,
            ObjectStoreWriter("s3://b/k", store=options),
            ObjectStoreReader("s3://b/k", store=options),
        ):
            assert_secret_free(repr(holder) + str(holder) + repr(pickle.dumps(holder)), f"{holder} with {name}")


def test_a_writer_for_another_process_carries_no_key():
    """What DCP's process-based async save pickles; a signing key stays behind as well."""
    for sign in (KEY, PEM):
        writer = ObjectStoreWriter("s3://b/k", sign=sign, access_key_id="AKIAMARKED", secret_access_key="MARKED")
        assert_secret_free(repr(writer) + repr(pickle.dumps(writer)), "the writer")


def test_nothing_that_is_stored_holds_one(server, said):
    names = {name: SECRETS[name] for name in ("access_key_id", "secret_access_key", "session_token")}
    events = []
    writer = ObjectStoreWriter(
        "s3://bucket/run", endpoint_url=server.url, region="r", sign=KEY, on_event=events.append, **names
    )
    ckpt_cloud.save({"w": torch.ones(5), "n": 1}, storage_writer=writer, no_dist=True)
    stored = server.dialect.objects
    assert {name.rpartition("/")[2] for name in stored} >= {"COMMIT", "manifest", "0.safetensors"}
    for name, (data, *_) in stored.items():
        assert_secret_free(data.decode("latin1") + name, name)
    assert_secret_free(repr(events) + repr(writer.report) + repr(writer), "events and report")
    assert_secret_free(
        repr([(r.bucket, r.key, r.query, r.headers.get("User-Agent")) for r in server.requests]), "requests"
    )


FORMS = {
    "bytes": ENCRYPTION_KEY,
    "hex": ENCRYPTION_KEY.hex(),
    "base64": base64.b64encode(ENCRYPTION_KEY).decode(),
    "function": lambda _: ENCRYPTION_KEY,
}
CALLS = {
    "save": lambda url, **key: ckpt_cloud.save({"w": torch.ones(5)}, checkpoint_id=url, encryption_key_id="k", **key),
    "load": lambda url, **key: ckpt_cloud.load({"w": torch.ones(5)}, checkpoint_id=url, **key),
    "verify": ckpt_cloud.verify,
    "open": ckpt_cloud.open,
    "gc": ckpt_cloud.gc,
    "copy": lambda url, **key: ckpt_cloud.copy(url, url / "copy", **key),
    "convert": lambda url, **key: ckpt_cloud.convert(url, url / "copy", to="ckpt-cloud", **key),
    "manager": lambda url, **key: ckpt_cloud.CheckpointManager(url.parent, **key).restore({"w": torch.ones(5)}, 1),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("damage", ["another key", "changed", "gone", "a function that fails"])
@pytest.mark.parametrize("call", CALLS)
def test_encryption_keys(tmp_path, said, call, damage, form):
    """In errors of every call that takes one, with the locals of every frame of ours."""
    url = tmp_path / "step-1"
    saved = bytes(32) if damage == "another key" else ENCRYPTION_KEY
    options = {"encryption_key": saved, "encryption_key_id": "k"}
    ckpt_cloud.save({"w": torch.ones(5)}, storage_writer=ObjectStoreWriter(url, **options), no_dist=True)
    for path in url.rglob("manifest"):
        if damage == "changed":
            path.write_bytes(path.read_bytes()[:-1])
        elif damage == "gone":
            path.unlink()

    def fails(_):
        raise KeyError(ENCRYPTION_KEY.decode())

    given = fails if damage == "a function that fails" and form == "function" else FORMS[form]
    try:
        CALLS[call](url, encryption_key=given)
    except CkptCloudError as error:
        # What a user's own function raises is the user's.
        error.__cause__ = None
        said.append((error.with_traceback(_ours(error.__traceback__)), given is not fails))
    if call not in ("gc", "manager") and damage != "a function that fails":
        assert said


@pytest.mark.parametrize("form", FORMS)
def test_encryption_keys_beside_an_option_that_is_refused(tmp_path, said, form):
    state, options = {"w": torch.ones(5)}, {"encryption_key": FORMS[form], "encryption_key_id": "k"}
    calls = (
        lambda: ckpt_cloud.save(state, checkpoint_id=tmp_path, compression="lz4", **options),
        lambda: ckpt_cloud.async_save(state, checkpoint_id=tmp_path, compression="lz4", **options),
        lambda: ckpt_cloud.save(state, storage_writer=ObjectStoreWriter(tmp_path), **options),
        lambda: ckpt_cloud.load(state, storage_reader=ObjectStoreReader(tmp_path), encryption_key=FORMS[form]),
    )
    for call in calls:
        with pytest.raises(InvalidOption) as refused:
            call()
        said.append((refused.value.with_traceback(_ours(refused.tb)), True))


def test_what_holds_encryption_keys_shows_and_carries_none(tmp_path):
    for form in FORMS.values():
        options = {"encryption_key": form, "encryption_key_id": "k"}
        manager = ckpt_cloud.CheckpointManager(tmp_path, check=False, **options)
        writer = ObjectStoreWriter("s3://b/k", **options)
        reader = ObjectStoreReader("s3://b/k", encryption_key=form)
        for holder in (writer, reader):
            assert_secret_free(repr(holder) + repr(vars(holder)) + repr(pickle.dumps(holder)), f"{holder}")
        assert_secret_free(repr(manager) + repr(vars(manager)), "the manager")
        manager.close()


def test_nothing_that_is_stored_holds_an_encryption_key(tmp_path):
    options = {"encryption_key": ENCRYPTION_KEY, "encryption_key_id": "k"}
    ckpt_cloud.save({"w": torch.ones(5), "n": 1}, storage_writer=ObjectStoreWriter(tmp_path / "a", **options))
    for path in (tmp_path / "a").rglob("*"):
        assert_secret_free(path.read_bytes().decode("latin1") if path.is_file() else "", path.name)


@pytest.mark.parametrize("act", ["echo-403", "echo-500", "page", "reset", "cut", "another-size"])
def test_reads_of_data(server, said, act):
    """They may go over signed URLs, whose queries hold the key's name, the session token and a signature."""
    names = {name: SECRETS[name] for name in ("access_key_id", "secret_access_key", "session_token")}
    options = {"endpoint_url": server.url, "region": "r", "retry": QUICK, **names}
    _save("s3://bucket/run", options)
    acts = ACTS | {"cut": faults.short(3), "another-size": faults.shorter(1)}
    server.fault(acts[act], method="GET", key="*.safetensors")
    for call in (_load, lambda url, given: ckpt_cloud.verify(url, deep=True, store=StoreOptions(**given))):
        with pytest.raises(CkptCloudError) as failed:
            call("s3://bucket/run", options)
        said.append((failed.value.with_traceback(_ours(failed.value.__traceback__)), act not in REPEATS))
