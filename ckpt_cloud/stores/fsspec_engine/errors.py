"""What filesystems raise, to ours: one function per library, each with its table, the most specific type first.

A library is imported when its own function is first asked, by which time its filesystem is there.
"""

from __future__ import annotations

import errno
import json
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

from ckpt_cloud.errors import (
    AlreadyExists,
    CkptCloudError,
    MissingCredentials,
    NotFound,
    PermissionDenied,
    PreconditionFailed,
    RequestRefused,
    StoreUnavailable,
    Throttled,
    Unsupported,
)
from ckpt_cloud.stores.foreign_errors import BY_CODE, gibberish, quoting, untrusted
from ckpt_cloud.stores.reaching import UNDECIDED, unanswered

Translate = Callable[[Exception, str, str], CkptCloudError | None]
"""Our error for a library's, an operation and a URL; None for one that is nobody's answer, such as a `TypeError`."""
_Row = tuple[type[BaseException] | tuple[type[BaseException], ...], type[CkptCloudError], str, str]

_BUCKET_HINT = BY_CODE["NoSuchBucket"][2]
_GOOGLE_HINT = (
    "check the credentials (gcloud auth application-default login, GOOGLE_APPLICATION_CREDENTIALS) and that they "
    "allow storage.objects.get, create, delete and list here"
)
_AZURE_HINT = (
    "check the key, the SAS token or the identity, and that it has the role Storage Blob Data Contributor here; "
    "AZURE_STORAGE_CONNECTION_STRING, when set, comes first"
)

_AZURE_CODES: dict[str, tuple[type[CkptCloudError], str, str]] = {
    **BY_CODE,
    "BlobNotFound": (NotFound, "no such object", ""),
    "BlobAlreadyExists": (AlreadyExists, "an object is already there", ""),
    "ConditionNotMet": (PreconditionFailed, "the object is another version", ""),
    "TargetConditionNotMet": (PreconditionFailed, "the object is another version", ""),
    "InvalidAuthenticationInfo": (PermissionDenied, "the store does not accept the credentials", _AZURE_HINT),
    "FeatureVersionMismatch": (Unsupported, "the store does not implement this request", ""),
}
"""With what obstore gives types of its own to."""

_OF_FILES: tuple[_Row, ...] = (
    (FileNotFoundError, NotFound, "no such object", ""),
    (FileExistsError, AlreadyExists, "an object is already there", ""),
    (PermissionError, PermissionDenied, "permission denied", "check the credentials, or the owner and mode"),
    (
        (IsADirectoryError, NotADirectoryError),
        RequestRefused,
        "a directory is where an object should be, or below one",
        "",
    ),
    (NotImplementedError, Unsupported, "the filesystem does not support this operation", ""),
)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG)
_MISTAKES = (TypeError, AttributeError, NameError, LookupError, AssertionError, ImportError, MemoryError)
"""What code raises that is wrong, rather than a store that is."""


@contextmanager
def translated(operation: str, url: str, translate: Translate) -> Iterator[None]:
    """Raises our error for whatever a filesystem raises inside, naming `operation` and `url`."""
    try:
        yield
    except CkptCloudError:
        raise
    except Exception as error:  # noqa: BLE001 - what is nobody's answer is raised as it is
        ours = untrusted(operation, url) if _is_certificate(error) else translate(error, operation, url)
        try:
            if ours is None:
                raise
            # Azure's further lines hold signatures, and the first says it all.
            said = str(error).strip().partition("\n")[0]
            raise quoting(ours, f"{type(error).__name__}: {said}") from None
        finally:
            del ours


def _is_certificate(error: BaseException | None) -> bool:
    """Whether a TLS handshake over a certificate is what it all began with; each library wraps that its own way."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return True
        error = error.__cause__ or error.__context__
    return False


def of_files(error: Exception, operation: str, url: str) -> CkptCloudError | None:
    """For filesystems at large, which agree on Python's own types."""
    if isinstance(error, TimeoutError):
        return unanswered(operation, url, error)
    found = _first(_OF_FILES, error, operation, url)
    if found is not None or isinstance(error, _MISTAKES):
        return found
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return RequestRefused(f"{operation}: {error.strerror}", url, "see the note, and make room if it says so")
    if isinstance(error, ValueError) and not isinstance(error, OSError):
        return RequestRefused(f"{operation}: the filesystem does not take the request", url)
    # Not knowing what it means, nothing may be concluded from it: a write may have landed.
    return unanswered(operation, url, error)


def of_s3(error: Exception, operation: str, url: str) -> CkptCloudError | None:
    """For s3fs: botocore's errors, and aiohttp's where a body breaks off."""
    import botocore.exceptions as foreign

    from ckpt_cloud.stores import aws_errors

    if isinstance(error, foreign.ClientError | foreign.SSLError):
        return aws_errors.translate(error, operation, url)
    if isinstance(error, foreign.HTTPClientError | foreign.ConnectionError | foreign.IncompleteReadError):
        return unanswered(operation, url, error)
    if isinstance(error, foreign.ParamValidationError):
        return RequestRefused(f"{operation}: not a valid request", url, "correct the URL")
    if isinstance(error, foreign.BotoCoreError):
        return aws_errors.translate(error, operation, url)
    return of_files(error, operation, url)


def of_gcs(error: Exception, operation: str, url: str) -> CkptCloudError | None:
    """For gcsfs, which gives 404, 412 and 403 Python's own types, and a code to the rest."""
    from gcsfs.retry import HttpError

    if isinstance(error, HttpError) and str(error.code).isdigit():
        return by_status(int(error.code), operation, url, _GOOGLE_HINT)
    if isinstance(error, FileExistsError):
        return PreconditionFailed(f"{operation}: the object is another version", url)
    unheard, rows = _google()
    if isinstance(error, unheard):
        return unanswered(operation, url, error)
    found = _first(rows, error, operation, url)
    if found is not None:
        return found
    if isinstance(error, json.JSONDecodeError):
        return gibberish(operation, url)
    if type(error) is OSError and error.errno is None:
        # gcsfs raises it bare for 403, and for nothing else in a single request.
        return PermissionDenied(f"{operation}: access denied", url, _GOOGLE_HINT)
    return of_files(error, operation, url)


@cache
def _google() -> tuple[tuple[type[Exception], ...], tuple[_Row, ...]]:
    """What is raised where nobody answers, and the rest."""
    import requests.exceptions
    from aiohttp import ClientError
    from gcsfs.retry import NonRetryableError
    from google.auth import exceptions as auth

    lost = "no usable Google credentials"
    return (requests.exceptions.RequestException, ClientError, auth.TransportError), (
        ((auth.GoogleAuthError, NonRetryableError), MissingCredentials, lost, _GOOGLE_HINT),
    )


def of_azure(error: Exception, operation: str, url: str) -> CkptCloudError | None:
    """For adlfs: the service's code, then azure-core's type, then the status."""
    from azure.core import exceptions as foreign

    if isinstance(error, foreign.HttpResponseError) and error.response is not None:
        code = str(getattr(getattr(error, "error_code", ""), "value", getattr(error, "error_code", "")))
        if code in _AZURE_CODES:
            kind, message, hint = _AZURE_CODES[code]
            return kind(f"{operation}: {message} ({code})", url, hint)
        return by_status(int(error.status_code or 0), operation, url, _AZURE_HINT)
    if isinstance(error, foreign.ClientAuthenticationError):
        return MissingCredentials(f"{operation}: no usable Azure credentials", url, _AZURE_HINT)
    if isinstance(error, foreign.AzureError):
        return unanswered(operation, url, error)
    if isinstance(error, ValueError):
        # Of XML that is none, and of headers that are missing.
        return gibberish(operation, url)
    return of_files(error, operation, url)


def by_status(status: int, operation: str, url: str, permission_hint: str) -> CkptCloudError:
    """For an answer of which only the HTTP status is known."""
    known: dict[int, tuple[type[CkptCloudError], str, str]] = {
        401: (PermissionDenied, "the store does not accept the credentials", permission_hint),
        403: (PermissionDenied, "access denied", permission_hint),
        404: (NotFound, "no such object", ""),
        412: (PreconditionFailed, "the object is another version", ""),
        429: (Throttled, "the store asks for fewer requests", "lower max_requests, or spread the prefixes"),
        501: (Unsupported, "the store does not implement this request", ""),
    }
    if status in known:
        kind, message, hint = known[status]
        return kind(f"{operation}: {message}", url, hint)
    if 400 <= status < 500 and status not in UNDECIDED:
        return RequestRefused(f"{operation}: the store answered {status}", url)
    return StoreUnavailable(f"{operation}: the store answered {status}", url, "try again")


def _first(rows: tuple[_Row, ...], error: Exception, operation: str, url: str) -> CkptCloudError | None:
    for theirs, kind, message, hint in rows:
        if isinstance(error, theirs):
            return kind(f"{operation}: {message}", url, hint)
    return None
