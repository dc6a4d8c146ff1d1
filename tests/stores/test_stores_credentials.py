"""Credentials, endpoint and region come from where boto3 takes them, with keyword arguments first."""

import secrets
from datetime import timedelta

import boto3
import botocore
import obstore
import pytest
from botocore import handlers
from botocore.session import Session

from ckpt_cloud import bridge
from ckpt_cloud.errors import FixRequest, MissingCredentials
from ckpt_cloud.options import StoreOptions
from ckpt_cloud.stores import aws, open_store, parse_url

URL = "s3://bucket/run"


def found(**options):
    """Access key, secret, token, endpoint and region for these options."""
    options = StoreOptions(**options)
    chain = aws.session(options, URL)
    keys = aws.credential_provider(chain, options, URL)()
    endpoint = aws.endpoint_url(chain, options, URL)
    return keys["access_key_id"], keys["secret_access_key"], keys["token"], endpoint, aws.region(chain)


@pytest.fixture
def aws_config(tmp_path, monkeypatch):
    """Writes the shared config file."""

    def write(text):
        path = tmp_path / "config"
        path.write_text(text)
        monkeypatch.setenv("AWS_CONFIG_FILE", str(path))

    return write


@pytest.fixture
def env_keys(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "from-env")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-from-env")


PROFILES = """
[default]
aws_access_key_id = from-default
aws_secret_access_key = s0
[profile team]
aws_access_key_id = from-team
aws_secret_access_key = s1
aws_session_token = t1
region = mars-1
endpoint_url = http://team.example
[profile split]
aws_access_key_id = from-split
aws_secret_access_key = s2
endpoint_url = http://general.example
services = split-services
[services split-services]
s3 =
    endpoint_url = http://s3-only.example
"""


def test_environment(env_keys, monkeypatch):
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token-from-env")
    assert found()[:3] == ("from-env", "secret-from-env", "token-from-env")


def test_profiles(aws_config, monkeypatch):
    aws_config(PROFILES)
    assert found() == ("from-default", "s0", None, None, "us-east-1")
    team = ("from-team", "s1", "t1", "http://team.example", "mars-1")
    assert found(profile="team") == team
    monkeypatch.setenv("AWS_PROFILE", "team")
    assert found() == team
    assert found(profile="default")[0] == "from-default"


def test_a_service_of_a_profile_has_an_endpoint_of_its_own(aws_config):
    aws_config(PROFILES)
    assert found(profile="split")[3] == "http://s3-only.example"


def test_the_credentials_file(tmp_path, monkeypatch):
    (tmp_path / "credentials").write_text("[default]\naws_access_key_id = in-file\naws_secret_access_key = s\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    assert found()[:2] == ("in-file", "s")


def test_keywords_come_before_the_environment(env_keys, monkeypatch):
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token-from-env")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://env.example")
    monkeypatch.setenv("AWS_REGION", "env-1")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "env-2")
    given = {"access_key_id": "given", "secret_access_key": "s", "endpoint_url": "http://given", "region": "given-1"}
    assert found(**given) == ("given", "s", None, "http://given", "given-1")


def test_keywords_come_before_a_profile(aws_config, monkeypatch):
    aws_config(PROFILES)
    monkeypatch.setenv("AWS_PROFILE", "team")
    assert found(access_key_id="given", secret_access_key="s")[:3] == ("given", "s", None)
    assert found(endpoint_url="http://given")[3] == "http://given"
    assert found(region="given-1")[4] == "given-1"


def test_the_endpoint_for_s3_comes_before_the_general_one(env_keys, aws_config, monkeypatch):
    aws_config("[default]\nendpoint_url = http://config.example\n")
    assert found()[3] == "http://config.example"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://general.example")
    assert found()[3] == "http://general.example"
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://s3.example")
    assert found()[3] == "http://s3.example"
    assert found(endpoint_url="http://given")[3] == "http://given"


@pytest.mark.parametrize("ignored", ["true", "TRUE"])
def test_configured_endpoints_may_be_ignored(env_keys, monkeypatch, ignored):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://general.example")
    monkeypatch.setenv("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", ignored)
    assert found()[3] is None
    assert found(endpoint_url="http://given")[3] == "http://given"


def test_an_empty_variable_is_none(env_keys, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "")
    assert found()[3] is None
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://general.example")
    assert found()[3] == "http://general.example"


@pytest.mark.parametrize("variable", ["AWS_REGION", "AWS_DEFAULT_REGION"])
def test_the_region(env_keys, monkeypatch, variable):
    assert found()[4] == "us-east-1"
    monkeypatch.setenv(variable, "mars-1")
    assert found()[4] == "mars-1"


def test_the_variable_that_errors_name_comes_before_what_else_says_a_region(env_keys, aws_config, monkeypatch):
    aws_config("[default]\nregion = config-1\n")
    assert found()[4] == "config-1"
    monkeypatch.setenv("AWS_DEFAULT_REGION", "default-1")
    assert found()[4] == "default-1"
    monkeypatch.setenv("AWS_REGION", "region-1")
    assert found()[4] == "region-1"
    assert found(region="given-1")[4] == "given-1"


@pytest.mark.parametrize("engine", ["native", "fsspec"])
def test_what_is_no_region_is_refused(env_keys, engine):
    with pytest.raises(FixRequest, match="'eu west' is no name of a region"):
        open_store(parse_url(URL), StoreOptions(region="eu west", engine=engine))


def boto3s_endpoint():
    return boto3.session.Session().client("s3", region_name="us-east-1").meta.endpoint_url


@pytest.mark.parametrize("profile", ["default", "team", "split"])
@pytest.mark.parametrize("variables", [(), ("AWS_ENDPOINT_URL",), ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")], ids=len)
def test_the_endpoint_is_boto3s(aws_config, monkeypatch, profile, variables):
    aws_config(PROFILES)
    monkeypatch.setenv("AWS_PROFILE", profile)
    for name in variables:
        monkeypatch.setenv(name, f"http://{name.lower().replace('_', '-')}.example")
    assert (found()[3] or "https://s3.amazonaws.com") == boto3s_endpoint()


def test_no_credentials_anywhere():
    with pytest.raises(MissingCredentials) as missing:
        open_store(parse_url(URL), StoreOptions())
    assert "AWS_PROFILE" in missing.value.hint
    assert missing.value.url == URL
    open_store(parse_url(URL), StoreOptions(anonymous=True))


def test_keys_that_did_not_travel_are_spoken_of():
    with pytest.raises(MissingCredentials) as missing:
        open_store(parse_url(URL), StoreOptions(secrets_dropped=("access_key_id",)))
    assert "not pickled" in missing.value.hint


def test_an_unknown_profile():
    with pytest.raises(FixRequest, match="no-such-profile") as wrong:
        open_store(parse_url(URL), StoreOptions(profile="no-such-profile"))
    assert "AWS_PROFILE" in wrong.value.hint


def test_a_broken_config(aws_config):
    aws_config("[default\nnonsense")
    with pytest.raises(FixRequest):
        open_store(parse_url(URL), StoreOptions())


def test_half_a_pair_in_the_environment(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "alone")
    with pytest.raises(MissingCredentials):
        open_store(parse_url(URL), StoreOptions())


def test_a_ca_bundle_that_cannot_be_read(env_keys, monkeypatch):
    monkeypatch.setenv("AWS_CA_BUNDLE", "/no/such/bundle.pem")
    with pytest.raises(FixRequest, match=r"/no/such/bundle\.pem"):
        open_store(parse_url(URL), StoreOptions())


def config_of(store):
    return {name.removeprefix("aws_"): value for name, value in store._store._clients.once.config.items()}


def test_what_obstore_is_told(env_keys):
    config = config_of(open_store(parse_url(URL), StoreOptions(region="mars-1")))
    assert config["region"] == "mars-1"
    assert str(config["virtual_hosted_style_request"]).lower() == "true"
    config = config_of(open_store(parse_url(URL), StoreOptions(endpoint_url="http://host:1")))
    assert config["endpoint"] == "http://host:1"
    assert str(config["virtual_hosted_style_request"]).lower() == "false"
    options = StoreOptions(endpoint_url="http://host:1", virtual_hosted_style=True)
    assert config_of(open_store(parse_url(URL), options))["endpoint"] == "http://bucket.host:1"


async def signed(url, **options):
    """What obstore would ask for."""
    store = open_store(parse_url(url), StoreOptions(**options))._store
    return (await obstore.sign_async(store._clients.reads, "GET", "k", timedelta(minutes=1))).partition("?")[0]


async def test_a_bucket_that_no_certificate_covers_goes_into_the_path(env_keys):
    assert await signed("s3://bucket") == "https://bucket.s3.us-east-1.amazonaws.com/k"
    assert await signed("s3://my.bucket") == "https://s3.us-east-1.amazonaws.com/my.bucket/k"
    assert await signed("s3://my.bucket", virtual_hosted_style=True) == "https://my.bucket.s3.us-east-1.amazonaws.com/k"


@pytest.mark.parametrize("region", ["cn-north-1", "us-iso-east-1", "us-gov-west-1", "eu-west-1"])
@pytest.mark.parametrize("virtual", [True, False])
async def test_aws_has_other_names_in_some_partitions(env_keys, region, virtual):
    """The ones that boto3 knows."""
    host = boto3.session.Session().client("s3", region_name=region).meta.endpoint_url.removeprefix("https://")
    expected = f"https://bucket.{host}/k" if virtual else f"https://{host}/bucket/k"
    assert await signed("s3://bucket", region=region, virtual_hosted_style=virtual) == expected


def test_fresh_credentials_are_asked_for_now_and_again():
    class Refreshing:
        calls = 0

        def get_frozen_credentials(self):
            self.calls += 1
            return type("Frozen", (), {"access_key": f"key-{self.calls}", "secret_key": "s", "token": "t"})

    chain = Refreshing()
    provider = aws.CredentialProvider(chain)
    assert [provider()["access_key_id"] for _ in range(2)] == ["key-1", "key-2"]
    assert "expires_at" in provider()


def test_a_profile_leads_to_a_server(moto_server, aws_config):
    bucket = f"bucket-{secrets.token_hex(4)}"
    moto_server.create_bucket(bucket)
    aws_config(
        f"[profile local]\naws_access_key_id = {moto_server.env['AWS_ACCESS_KEY_ID']}\n"
        f"aws_secret_access_key = {moto_server.env['AWS_SECRET_ACCESS_KEY']}\n"
        f"region = us-east-1\nendpoint_url = {moto_server.endpoint_url}\n"
    )
    store = open_store(parse_url(f"s3://{bucket}/run"), StoreOptions(profile="local"))
    bridge.run(store.put("k", b"x"))
    assert bridge.run(store.get("k", limit=1))[0] == b"x"


@pytest.mark.parametrize("engine", ["native", "fsspec"])
def test_half_a_key_is_none(monkeypatch, engine):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "alone")
    with pytest.raises(MissingCredentials, match="no usable AWS credentials"):
        bridge.run(open_store(parse_url(URL), StoreOptions(engine=engine)).head("k"))


def test_handlers_that_come_later_are_heard(monkeypatch):
    """moto adds one where it is imported, without which its mocks would let requests through."""
    aws.session(StoreOptions(), URL)
    later = [*handlers.BUILTIN_HANDLERS, ("a-test-of-ours", lambda **_: "heard")]
    monkeypatch.setattr(aws, "BUILTIN_HANDLERS", later)
    monkeypatch.setattr(handlers, "BUILTIN_HANDLERS", later)
    monkeypatch.setattr("botocore.session.handlers.BUILTIN_HANDLERS", later)
    emitter = aws.session(StoreOptions(), URL).get_component("event_emitter")
    assert [answer for _, answer in emitter.emit("a-test-of-ours")] == ["heard"]


def test_sessions_have_botocores_own_handlers_and_share_none_that_are_added():
    """Handlers are registered once in a process; each session has a copy."""
    one, other, own = aws.session(StoreOptions(), URL), aws.session(StoreOptions(), URL), Session()

    def answers(session, event):
        emitter = session.get_component("event_emitter")
        return [answer for _, answer in emitter.emit(event, context={}, signing_name="sts")]

    # Without it, a role that is assumed by a web identity would need keys to ask for keys.
    event = "choose-signer.sts.AssumeRoleWithWebIdentity"
    assert answers(one, event) == answers(own, event)
    assert botocore.UNSIGNED in answers(one, event)
    one.register("a-test-of-ours", lambda **_: "heard")
    assert answers(one, "a-test-of-ours")[-1:] == ["heard"]
    assert "heard" not in answers(other, "a-test-of-ours")
    assert "heard" not in answers(aws.session(StoreOptions(), URL), "a-test-of-ours")
