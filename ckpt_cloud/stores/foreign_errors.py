"""obstore's errors to ours, in one table.

obstore carries the HTTP status and S3's error code only inside its message, so the two are read from there: the code
from the `<Code>` element of the store's XML answer, the status from the debug form of the Rust error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from obstore import exceptions as foreign

from ckpt_cloud.errors import (
    AlreadyExists,
    BucketNotFound,
    CkptCloudError,
    FixRequest,
    InvalidURL,
    MissingCredentials,
    NotFound,
    PermissionDenied,
    PreconditionFailed,
    RequestRefused,
    StoreUnavailable,
    Throttled,
    Unsupported,
    UntrustedServer,
    WrongRegion,
)
from ckpt_cloud.redaction import scrubbed
from ckpt_cloud.stores.reaching import HINT, UNDECIDED, unanswered

_CODE = re.compile(r"(?:<Code>\s*|\(code: )(\w+)(?:\s*</Code>|\))")
"""In an answer, or of one key in that to a bulk delete."""
_REGION = re.compile(r"<Region>\s*([a-z0-9-]+)\s*</Region>")
_ENDPOINT = re.compile(r"<Endpoint>\s*(?:[^<]*\.)?s3[.-]([a-z]{2}[a-z-]*-\d)\.[^<]*</Endpoint>")
_NO_CREDENTIALS = re.compile(
    r"External \w+ credential provider|missing credentials|credentials? provider", re.IGNORECASE
)
_CERTIFICATE = re.compile(r"invalid peer certificate|certificate verify failed|InvalidCertificate", re.IGNORECASE)
_REDIRECT = "redirect without LOCATION"
"""obstore's words for S3's 301, whose body it does not hand on."""
_HTML = re.compile(r"<!doctype html|<html", re.IGNORECASE)
_DEBUG = "\n\nDebug source"
_STATUS = re.compile(r"status(?:: | code: )(\d{3})")

_BUCKET_HINT = "create the bucket first, or correct its name; ckpt_cloud never creates one"
_PERMISSION_HINT = (
    "check the credentials and that they may read, write and list here (on S3 s3:GetObject, s3:PutObject and "
    "s3:ListBucket; without s3:ListBucket S3 answers 403 for a key that does not exist)"
)
_AZURE_HINT = (
    "check the account, its key, SAS or identity (AZURE_STORAGE_CONNECTION_STRING, AZURE_STORAGE_*, az login), and "
    "that it may read, write and list here (Storage Blob Data Contributor)"
)
_RENEW_HINTS = {
    "s3": "set or renew them: AWS_PROFILE, AWS_ACCESS_KEY_ID or aws sso login",
    "gs": "set or renew them: GOOGLE_APPLICATION_CREDENTIALS or gcloud auth application-default login",
    "az": "set or renew them: AZURE_STORAGE_CONNECTION_STRING, AZURE_STORAGE_* or az login",
}
_PROXY_HINT = "a proxy may answer in its place: check the endpoint, proxy_url and the HTTPS_PROXY variable"
_NOT_A_DIRECTORY = "Not a directory (os error 20)"
_NO_PATH = "Could not parse path"
"""obstore's words, in a bare ValueError, for a key with control characters."""
_OPEN = "open"
_READS = ("head", "get", "read")
"""For which a file where a directory should be means that there is no such object."""
_ARCHIVED_HINT = "a lifecycle rule may have moved it: restore it (S3) or set its tier (Azure), and exempt checkpoints"
_REGION_HINT = "set AWS_REGION or region= to the bucket's region"

BY_CODE: dict[str, tuple[type[CkptCloudError], str, str]] = {
    "NoSuchBucket": (BucketNotFound, "the bucket does not exist", _BUCKET_HINT),
    "InvalidBucketName": (InvalidURL, "the store does not accept this bucket name", "correct the URL"),
    "AccessDenied": (PermissionDenied, "access denied", _PERMISSION_HINT),
    "AllAccessDisabled": (PermissionDenied, "access denied", _PERMISSION_HINT),
    "InvalidAccessKeyId": (PermissionDenied, "the store does not know this access key", _PERMISSION_HINT),
    "SignatureDoesNotMatch": (PermissionDenied, "the secret key is wrong", _PERMISSION_HINT),
    "ExpiredToken": (PermissionDenied, "the credentials have expired", "renew them (for SSO: aws sso login)"),
    "InvalidToken": (PermissionDenied, "the session token is not valid", "renew the credentials"),
    "RequestTimeTooSkewed": (PermissionDenied, "this machine's clock is too far off", "set the clock (NTP)"),
    "PermanentRedirect": (WrongRegion, "the bucket is in another region", _REGION_HINT),
    "AuthorizationHeaderMalformed": (WrongRegion, "the request was signed for another region", _REGION_HINT),
    "IllegalLocationConstraintException": (WrongRegion, "the bucket is in another region", _REGION_HINT),
    "SlowDown": (Throttled, "the store asks for fewer requests", "lower max_requests, or spread the prefixes"),
    "ServiceUnavailable": (StoreUnavailable, "the store is unavailable", "try again"),
    "RequestTimeout": (StoreUnavailable, "the store waited too long for the request", "try again"),
    "ConditionalRequestConflict": (StoreUnavailable, "a concurrent write was in progress", "try again"),
    "OperationAborted": (StoreUnavailable, "a concurrent write was in progress", "try again"),
    # Completed by a request whose answer was lost, or aborted by a lifecycle rule: what was stored is told by reading.
    "NoSuchUpload": (StoreUnavailable, "the upload is gone", "try again"),
    "InvalidBlockList": (StoreUnavailable, "blocks of the upload are gone", "try again"),
    "NotImplemented": (Unsupported, "the store does not implement this request", ""),
    "BadDigest": (StoreUnavailable, "the bytes changed on their way to the store", "try again"),
    "XAmzContentChecksumMismatch": (StoreUnavailable, "the bytes changed on their way to the store", "try again"),
    "XAmzContentSHA256Mismatch": (StoreUnavailable, "the bytes changed on their way to the store", "try again"),
    "InternalError": (StoreUnavailable, "the store failed", "try again"),
    "InvalidObjectState": (RequestRefused, "the object is archived", _ARCHIVED_HINT),
    # KMS's, by way of S3, and MinIO's.
    "ThrottlingException": (Throttled, "the store asks for fewer requests", "lower max_requests"),
    "SlowDownRead": (Throttled, "the store asks for fewer requests", "lower max_requests"),
    "SlowDownWrite": (Throttled, "the store asks for fewer requests", "lower max_requests"),
    # Azure's, https://learn.microsoft.com/rest/api/storageservices/blob-service-error-codes
    "ContainerNotFound": (BucketNotFound, "the container does not exist", _BUCKET_HINT),
    "ContainerBeingDeleted": (BucketNotFound, "the container is being deleted", _BUCKET_HINT),
    "InvalidResourceName": (InvalidURL, "the store does not accept this container name", "correct the URL"),
    "AuthenticationFailed": (PermissionDenied, "the store does not accept the credentials", _AZURE_HINT),
    "AuthorizationFailure": (PermissionDenied, "the store does not accept the credentials", _AZURE_HINT),
    "AuthorizationPermissionMismatch": (PermissionDenied, "access denied", _AZURE_HINT),
    "InsufficientAccountPermissions": (PermissionDenied, "access denied", _AZURE_HINT),
    "NoAuthenticationInformation": (PermissionDenied, "the request was not signed", _AZURE_HINT),
    "PublicAccessNotPermitted": (PermissionDenied, "the account allows no anonymous access", _AZURE_HINT),
    "KeyBasedAuthenticationNotPermitted": (PermissionDenied, "the account allows no keys", "use az login or a SAS"),
    "BlobArchived": (RequestRefused, "the object is archived", _ARCHIVED_HINT),
    "BlobBeingRehydrated": (RequestRefused, "the object is on its way out of the archive", "wait until it is there"),
    "ServerBusy": (Throttled, "the store asks for fewer requests", "lower max_requests"),
    "OperationTimedOut": (StoreUnavailable, "the store took too long", "try again"),
}

_BY_TYPE: tuple[tuple[type[BaseException], type[CkptCloudError], str, str], ...] = (
    (foreign.AlreadyExistsError, AlreadyExists, "an object is already there", ""),
    (foreign.PreconditionError, PreconditionFailed, "the object is another version", ""),
    (foreign.NotModifiedError, PreconditionFailed, "the object is the same version", ""),
    (foreign.PermissionDeniedError, PermissionDenied, "permission denied", _PERMISSION_HINT),
    (foreign.UnauthenticatedError, PermissionDenied, "the store does not accept the credentials", _PERMISSION_HINT),
    (foreign.InvalidPathError, InvalidURL, "not a valid object path", "correct the URL"),
    (foreign.NotSupportedError, Unsupported, "the store does not support this operation", ""),
    (foreign.UnknownConfigurationKeyError, FixRequest, "unknown store configuration", ""),
    (NotImplementedError, Unsupported, "the store does not support this operation", ""),
    (foreign.NotFoundError, NotFound, "no such object", ""),
    (FileNotFoundError, NotFound, "no such object", ""),
    (PermissionError, PermissionDenied, "permission denied by the file system", "check the directory's owner and mode"),
)


@contextmanager
def translated(operation: str, url: str) -> Iterator[None]:
    """Raises our error for whatever obstore raises inside, naming `operation` and `url`."""
    try:
        yield
    except CkptCloudError:
        raise
    except (foreign.BaseError, OSError, NotImplementedError, ValueError) as error:
        if isinstance(error, ValueError) and not str(error).startswith(_NO_PATH):
            raise
        raise quoting(translate(error, operation, url), str(error).partition(_DEBUG)[0].strip()) from None


def quoting(ours: CkptCloudError, said: str) -> CkptCloudError:
    """`ours` with the store's own words, without the queries of URLs; theirs may hold what must not be pickled.

    Nobody who raises it keeps it in a variable: its traceback would hold that frame and that frame it, and with both
    the buffers of a request that failed, until the garbage collector comes.
    """
    ours.add_note(f"the store said: {scrubbed(said)[:500]}")
    return ours


def translate(error: BaseException, operation: str, url: str) -> CkptCloudError:
    """Our error for one of obstore's; the store's error code decides, then the type, then the HTTP status."""
    text = str(error)
    code = _CODE.search(text)
    if code and code[1] in BY_CODE:
        return by_code(code[1], text, operation, url)
    if _NO_CREDENTIALS.search(text) and not _STATUS.search(text):
        return MissingCredentials(f"{operation}: the credentials cannot be had", url, renew_hint(url))
    if _CERTIFICATE.search(text):
        return untrusted(operation, url)
    if text.startswith(_NO_PATH):
        return InvalidURL(f"{operation}: a key that no store takes", url, "leave out control characters")
    if _NOT_A_DIRECTORY in text and operation in _READS:
        return NotFound(f"{operation}: no such object", url)
    for theirs, kind, message, hint in _BY_TYPE:
        if isinstance(error, theirs):
            return kind(f"{operation}: {message}", url, hint)
    return _by_status(text, code[1] if code else "", operation, url)


def by_code(code: str, text: str, operation: str, url: str) -> CkptCloudError:
    """Our error for an answer with a code of `BY_CODE`; `text` is the whole answer."""
    kind, message, hint = BY_CODE[code]
    if kind is WrongRegion:
        region = _REGION.search(text) or _ENDPOINT.search(text)
        if region:
            message = f"the bucket is in region {region[1]}"
            hint = f"set AWS_REGION or region= to {region[1]}"
    return kind(f"{operation}: {message} ({code})", url, hint)


def in_region(region: str, error: WrongRegion) -> WrongRegion:
    """`error`, saying which region is the right one."""
    operation = error.message.partition(":")[0]
    return WrongRegion(
        f"{operation}: the bucket is in region {region}", error.url, f"set AWS_REGION or region= to {region}"
    )


def renew_hint(url: str) -> str:
    """Where the credentials for `url` come from."""
    scheme = url.partition("://")[0].removeprefix("fsspec+")
    return _RENEW_HINTS["gs" if scheme in ("gs", "gcs") else "s3" if scheme == "s3" else "az"]


def untrusted(operation: str, url: str) -> CkptCloudError:
    """For a TLS handshake that ended over the certificate."""
    hint = "name its authority with ca_bundle or AWS_CA_BUNDLE, and check the endpoint's name and the clock"
    return UntrustedServer(f"{operation}: the server's TLS certificate is not accepted", url, hint)


def web_page(status: int, operation: str, url: str) -> CkptCloudError:
    """For HTML where a store's answer should be."""
    kind = RequestRefused if 400 <= status < 500 and status not in UNDECIDED else StoreUnavailable
    return kind(f"{operation}: a web page came back (status {status}), not a store's answer", url, _PROXY_HINT)


def gibberish(operation: str, url: str) -> CkptCloudError:
    """For an answer that its library cannot read."""
    return StoreUnavailable(f"{operation}: what came back is not a store's answer", url, _PROXY_HINT)


def _by_status(text: str, code: str, operation: str, url: str) -> CkptCloudError:
    found = _STATUS.search(text)
    status = int(found[1]) if found else 0
    if status == 429 or code == "SlowDown":
        return Throttled(f"{operation}: the store asks for fewer requests", url)
    if status in (301, 307) or _REDIRECT in text:
        return WrongRegion(f"{operation}: the store redirects to another region", url, _REGION_HINT)
    if _HTML.search(text):
        return web_page(status, operation, url)
    if status in (401, 403):
        return PermissionDenied(f"{operation}: the store answered {status} {code}".rstrip(), url, _PERMISSION_HINT)
    if 400 <= status < 500 and status not in UNDECIDED:
        return RequestRefused(f"{operation}: the store answered {status} {code}".rstrip(), url)
    if operation == _OPEN:
        return FixRequest("open: the configuration of the store cannot be used", url, "see the note")
    if not status:
        return unanswered(operation, url, text)
    return StoreUnavailable(f"{operation}: the store answered {status} {code}".rstrip(), url, HINT)
