"""Where S3's credentials, region and endpoint come from: keyword arguments, then what boto3 would use."""

from __future__ import annotations

import copy
import os
import re
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import TYPE_CHECKING, Any

import botocore.exceptions
from botocore.config import Config
from botocore.configprovider import ConfiguredEndpointProvider
from botocore.handlers import BUILTIN_HANDLERS
from botocore.hooks import HierarchicalEmitter
from botocore.session import Session
from botocore.utils import check_dns_name, validate_region_name

from ckpt_cloud.errors import FixRequest, MissingCredentials
from ckpt_cloud.options import StoreOptions
from ckpt_cloud.stores.reaching import address, authorities

if TYPE_CHECKING:
    from obstore.store import S3Credential

_HINT = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or log in (aws sso login), or give the process "
    "a role; pass anonymous=True for a public bucket"
)
_REGION = "us-east-1"
"""Where none is configured: most S3-compatible servers take it."""
_SUFFIX = "amazonaws.com"
REFRESH_EVERY = timedelta(minutes=5)
_MARGIN = timedelta(minutes=1)
"""Keys are not used in their last minute."""


class CredentialProvider:
    """Asks boto3's chain for credentials now and again, so that short-lived ones stay fresh in a long save."""

    def __init__(self, credentials: Any) -> None:
        self._credentials = credentials

    def __call__(self) -> S3Credential:
        frozen = self._credentials.get_frozen_credentials()
        asked_again = datetime.now(UTC) + REFRESH_EVERY
        # botocore has no public name for it, and renews what is left for less than 10 minutes.
        end = getattr(self._credentials, "_expiry_time", None)
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": min(asked_again, end.astimezone(UTC) - _MARGIN) if end else asked_again,
        }


def session(options: StoreOptions, url: str, kind: type[Session] = Session, config: type[Config] = Config) -> Session:
    """botocore's session for `options`, the one that boto3 would work with, also for asking for credentials.

    Args:
        options: come before what is configured.
        url: for messages.
        kind, config: other classes of sessions and of their settings, such as aiobotocore's.

    Raises:
        FixRequest: the profile does not exist, the shared config cannot be read, or the region is no name of one.
    """
    found = _session(options.profile) if kind is Session else kind(profile=options.profile)
    if options.ca_bundle:
        found.set_config_variable("ca_bundle", options.ca_bundle)
    if options.proxy_url:
        found.set_default_client_config(config(proxies={"http": options.proxy_url, "https": options.proxy_url}))
    if options.access_key_id and options.secret_access_key:
        found.set_credentials(options.access_key_id, options.secret_access_key, options.session_token)
    try:
        found.get_scoped_config()
        configured = found.get_config_variable("region")
    except botocore.exceptions.BotoCoreError as error:
        raise FixRequest(f"the AWS configuration cannot be used: {error}", url, "check AWS_PROFILE") from None
    # AWS_REGION is unknown to botocore; other tools of AWS's put it before AWS_DEFAULT_REGION and the config.
    chosen = options.region or os.environ.get("AWS_REGION") or configured or _REGION
    found.set_config_variable("region", _checked(chosen, url))
    return found


def _session(profile: str | None) -> Session:
    handlers = copy.copy(_handlers(len(BUILTIN_HANDLERS)))
    return Session(profile=profile, event_hooks=handlers, include_builtin_handlers=False)


@cache
def _handlers(_number: int) -> HierarchicalEmitter:
    """botocore's own, which take ten times as long to register as a session does to make.

    There may come more: moto adds one, without which its mocks would let requests through.
    """
    emitter = HierarchicalEmitter()
    Session(event_hooks=emitter)
    return emitter


def _checked(region: str, url: str) -> str:
    try:
        validate_region_name(region)
    except botocore.exceptions.BotoCoreError:
        hint = "set AWS_REGION or region= to one such as eu-west-1"
        raise FixRequest(f"{region!r} is no name of a region", url, hint) from None
    return region


def region(chain: Session) -> str:
    """The region that requests are signed for."""
    return str(chain.get_config_variable("region"))


def ca_bundle(chain: Session, url: str) -> str | None:
    """The file of certificate authorities that boto3 would trust, other than its own.

    Raises:
        FixRequest: it cannot be used.
    """
    found = chain.get_config_variable("ca_bundle")
    return authorities(str(found), url) if found else None


def credential_provider(chain: Session, options: StoreOptions, url: str) -> CredentialProvider:
    """Credentials of `chain` for obstore.

    Raises:
        MissingCredentials: none anywhere.
    """
    try:
        credentials = chain.get_credentials()
    except botocore.exceptions.BotoCoreError as error:
        raise MissingCredentials(f"no usable AWS credentials: {error}", url, _HINT) from None
    if credentials is None:
        hint = _HINT
        if options.secrets_dropped:
            hint = f"keys passed as arguments are not pickled into another process; {_HINT}"
        raise MissingCredentials("no AWS credentials were found", url, hint)
    return CredentialProvider(credentials)


def endpoint_url(chain: Session, options: StoreOptions, url: str) -> str | None:
    """The endpoint that boto3 would use where one is configured, or None for AWS itself.

    Raises:
        FixRequest: it is no address.
    """
    found = options.endpoint_url or _configured_endpoint(chain)
    return address(found, "endpoint", url) if found else None


def _configured_endpoint(chain: Session) -> str | None:
    if chain.get_config_variable("ignore_configured_endpoint_urls"):
        return None
    config = {"full_config": chain.full_config, "scoped_config": chain.get_scoped_config()}
    configured = ConfiguredEndpointProvider(**config, client_name="s3").provide()
    return str(configured) if configured else None


def partition_endpoint(chain: Session) -> str | None:
    """AWS's own endpoint where it is not below `amazonaws.com`, as in China; obstore knows no other."""
    name = region(chain)
    for partition in chain.get_data("partitions")["partitions"]:
        suffix = partition["outputs"]["dnsSuffix"]
        if suffix != _SUFFIX and re.match(partition["regionRegex"], name):
            return f"https://s3.{name}.{suffix}"
    return None


def virtual_hosted_style(chain: Session, options: StoreOptions, endpoint: str | None, bucket: str) -> bool:
    """Whether the bucket goes into the host name: as asked, else as the AWS config's `addressing_style` says."""
    if options.virtual_hosted_style is not None:
        return options.virtual_hosted_style
    style = (chain.get_scoped_config().get("s3") or {}).get("addressing_style")
    if style in ("virtual", "path"):
        return bool(style == "virtual")
    # Names of servers of one's own seldom have wildcards, and AWS's certificates cover no bucket with a dot.
    return not endpoint and check_dns_name(bucket)


def store_checksums(chain: Session, options: StoreOptions) -> bool:
    """Whether uploads carry a checksum for the store to check.

    botocore's own default is `when_supported`; without a word from the user ours is not to, since older servers of
    S3's dialect refuse it and our checksums cover every byte from end to end.
    """
    if options.store_checksums is not None:
        return options.store_checksums
    said = os.environ.get("AWS_REQUEST_CHECKSUM_CALCULATION") or chain.get_scoped_config().get(
        "request_checksum_calculation", ""
    )
    return str(said).lower() == "when_supported"
