"""botocore's errors to ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import botocore.exceptions as foreign

from ckpt_cloud.errors import (
    CkptCloudError,
    FixRequest,
    MissingCredentials,
    NotFound,
    PermissionDenied,
    PreconditionFailed,
    RequestRefused,
    StoreUnavailable,
    Throttled,
    Unsupported,
    WrongRegion,
)
from ckpt_cloud.stores.foreign_errors import BY_CODE, by_code, in_region, quoting, renew_hint, untrusted
from ckpt_cloud.stores.reaching import UNDECIDED, unanswered

_SERVER = 500
_ASKING_FOR_KEYS = ("AssumeRole", "AssumeRoleWithWebIdentity", "GetRoleCredentials", "CreateToken")
"""What is asked of STS and SSO on the way to the store; a refusal there is none of the store's."""


def about_keys(error: foreign.ClientError) -> bool:
    """Whether it was not the store that refused, but the service that gives keys for a role."""
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    return error.operation_name in _ASKING_FOR_KEYS and 400 <= status < _SERVER


_NO_KEYS = (
    # Of a service that gives keys, and of chains that end.
    foreign.ClientError,
    foreign.NoCredentialsError,
    foreign.PartialCredentialsError,
    foreign.CredentialRetrievalError,
    foreign.SSOError,
    foreign.TokenRetrievalError,
)


@contextmanager
def translated(operation: str, url: str) -> Iterator[None]:
    """Raises our error for whatever botocore raises inside, naming `operation` and `url`."""
    try:
        yield
    except (foreign.BotoCoreError, foreign.ClientError) as error:
        raise quoting(translate(error, operation, url), str(error)) from None


def translate(error: BaseException, operation: str, url: str) -> CkptCloudError:
    """Our error for one of botocore's: by S3's code, then by the HTTP status, then by type."""
    if isinstance(error, foreign.ClientError) and not about_keys(error):
        return _answered(error, operation, url)
    if isinstance(error, _NO_KEYS):
        return MissingCredentials(f"{operation}: no usable AWS credentials", url, renew_hint("s3://"))
    if isinstance(error, foreign.SSLError) and "certificate" in str(error).lower():
        return untrusted(operation, url)
    if isinstance(error, foreign.HTTPClientError | foreign.ConnectionError):
        return unanswered(operation, url, error)
    return FixRequest(f"{operation}: the AWS configuration cannot be used", url, "check AWS_PROFILE")


def is_no_listing(answer: Mapping[str, Any]) -> bool:
    """Whether what came back for ListObjectsV2 is something else, such as a proxy's page, which reads as empty."""
    return not {"Name", "KeyCount", "IsTruncated", "MaxKeys"} & answer.keys()


def _answered(error: foreign.ClientError, operation: str, url: str) -> CkptCloudError:
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if code in BY_CODE:
        ours = by_code(code, "", operation, url)
        region = _region(error)
        return in_region(region, ours) if region and isinstance(ours, WrongRegion) else ours
    if status == 301:
        region = _region(error)
        ours = WrongRegion(f"{operation}: the bucket is in another region", url, "set AWS_REGION or region=")
        return in_region(region, ours) if region else ours
    if status == 412 or code == "PreconditionFailed":
        return PreconditionFailed(f"{operation}: the object is another version", url)
    if status in (401, 403):
        return PermissionDenied(f"{operation}: the store answered {status} {code}", url, BY_CODE["AccessDenied"][2])
    if status == 501:
        return Unsupported(f"{operation}: the store does not implement this request", url)
    if status == 429:
        return Throttled(f"{operation}: the store asks for fewer requests", url)
    if status == 404:
        return NotFound(f"{operation}: no such object or upload ({code})", url)
    if 400 <= status < _SERVER and status not in UNDECIDED:
        return RequestRefused(f"{operation}: the store answered {status} {code}", url)
    return StoreUnavailable(f"{operation}: the store answered {status} {code}", url, "try again")


def _region(error: foreign.ClientError) -> str | None:
    """Where the bucket is, as far as the answer says it."""
    headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    said = headers.get("x-amz-bucket-region") or dict(error.response.get("Error", {})).get("Region")
    return str(said) if said else None
