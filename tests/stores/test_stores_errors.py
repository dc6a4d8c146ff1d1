"""Every error of obstore and every code of S3 becomes one of ours."""

import inspect

import pytest
from obstore import exceptions as foreign

from ckpt_cloud import errors
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
    TryAgain,
    Unsupported,
    WrongRegion,
)
from ckpt_cloud.stores.foreign_errors import BY_CODE, translate, translated
from ckpt_cloud.stores.reaching import unanswered

URL = "s3://bucket/run/COMMIT"
EXPECTED = {
    "AlreadyExistsError": AlreadyExists,
    "BaseError": StoreUnavailable,
    "GenericError": StoreUnavailable,
    "InvalidPathError": InvalidURL,
    "JoinError": StoreUnavailable,
    "NotFoundError": NotFound,
    "NotModifiedError": PreconditionFailed,
    "NotSupportedError": Unsupported,
    "PermissionDeniedError": PermissionDenied,
    "PreconditionError": PreconditionFailed,
    "UnauthenticatedError": PermissionDenied,
    "UnknownConfigurationKeyError": FixRequest,
}
THEIRS = {
    name: kind
    for name, kind in inspect.getmembers(foreign, inspect.isclass)
    if issubclass(kind, BaseException) and kind.__module__.startswith("obstore")
}


def test_the_table_below_knows_every_class_of_obstore():
    assert set(THEIRS) == set(EXPECTED)


@pytest.mark.parametrize("name", THEIRS)
def test_every_class_of_obstore(name):
    ours = translate(THEIRS[name]("something went wrong"), "put", URL)
    assert type(ours) is EXPECTED[name]
    assert ours.url == URL
    assert ours.message.startswith("put: ")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (FileNotFoundError("no such file"), NotFound),
        (PermissionError("not yours"), PermissionDenied),
        (NotImplementedError("not by this store"), Unsupported),
        (ConnectionResetError("reset"), StoreUnavailable),
        (OSError("disk on fire"), StoreUnavailable),
    ],
)
def test_pythons_own_errors(error, kind):
    with pytest.raises(CkptCloudError) as ours, translated("get", URL):
        raise error
    assert type(ours.value) is kind
    assert ours.value.__cause__ is None
    assert ours.value.__suppress_context__


def answer(status, code, extra=""):
    """The message of obstore's GenericError for an HTTP answer, as seen with 0.12."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>text</Message>{extra}</Error>"
    return foreign.GenericError(
        f"Generic S3 error: Error performing PUT https://host/bucket/key?sig=hunter2 in 1ms - Server returned non-2xx "
        f"status code: {status} Something: {body}\n\nDebug source:\nGeneric {{ hunter2 }}"
    )


@pytest.mark.parametrize("code", BY_CODE)
def test_every_known_code(code):
    kind, message, hint = BY_CODE[code]
    ours = translate(answer(400, code), "put", URL)
    assert type(ours) is kind
    assert message in str(ours)
    assert code in str(ours)
    assert ours.hint == hint


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("NoSuchBucket", BucketNotFound),
        ("AccessDenied", PermissionDenied),
        ("InvalidAccessKeyId", PermissionDenied),
        ("SignatureDoesNotMatch", PermissionDenied),
        ("ExpiredToken", PermissionDenied),
        ("PermanentRedirect", WrongRegion),
        ("AuthorizationHeaderMalformed", WrongRegion),
        ("SlowDown", Throttled),
        ("ConditionalRequestConflict", TryAgain),
        ("OperationAborted", TryAgain),
        ("NotImplemented", Unsupported),
    ],
)
def test_codes_that_the_protocols_rest_on(code, kind):
    assert issubclass(BY_CODE[code][0], kind)


@pytest.mark.parametrize("code", ["ConditionalRequestConflict", "OperationAborted"])
def test_a_conflict_decides_nothing(code):
    """S3's 409, which obstore takes for an object that is there: the other write may yet fail."""
    ours = translate(foreign.AlreadyExistsError(f"<Code>{code}</Code>"), "put", URL)
    assert isinstance(ours, StoreUnavailable)


@pytest.mark.parametrize(
    ("theirs", "code", "kind"),
    [
        (foreign.AlreadyExistsError, "BlobAlreadyExists", AlreadyExists),
        (foreign.AlreadyExistsError, "PreconditionFailed", AlreadyExists),
        (foreign.PreconditionError, "ConditionNotMet", PreconditionFailed),
        (foreign.PreconditionError, "PreconditionFailed", PreconditionFailed),
    ],
)
def test_a_refused_condition_is_one_whatever_its_code(theirs, code, kind):
    assert type(translate(theirs(f"<Code>{code}</Code>"), "put", URL)) is kind


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (301, WrongRegion),
        (307, WrongRegion),
        (400, RequestRefused),
        (405, RequestRefused),
        (408, StoreUnavailable),
        (409, StoreUnavailable),
        (411, RequestRefused),
        (416, RequestRefused),
        (429, Throttled),
        (425, StoreUnavailable),
        (460, StoreUnavailable),
        (499, StoreUnavailable),
        (500, StoreUnavailable),
        (502, StoreUnavailable),
        (503, StoreUnavailable),
        (504, StoreUnavailable),
        (507, StoreUnavailable),
    ],
)
def test_unknown_codes_go_by_status(status, kind):
    ours = translate(answer(status, "SomethingNew"), "put", URL)
    assert type(ours) is kind


def test_no_credentials():
    ours = translate(foreign.GenericError("Generic S3 error: missing credentials"), "put", URL)
    assert type(ours) is MissingCredentials
    assert ours.hint


def test_the_stores_words_come_as_a_note_without_secrets():
    with pytest.raises(RequestRefused) as ours, translated("put", URL):
        raise answer(400, "SomethingNew")
    (note,) = ours.value.__notes__
    assert note.startswith("the store said: Generic S3 error")
    assert "SomethingNew" in note
    assert "hunter2" not in note
    assert "hunter2" not in f"{ours.value!r} {ours.value}"


def test_our_own_errors_pass_through():
    mine = errors.RangeNotSatisfiable("mine")
    with pytest.raises(errors.RangeNotSatisfiable) as seen, translated("put", URL):
        raise mine
    assert seen.value is mine


@pytest.mark.parametrize("stranger", [ValueError("planner"), KeyError("x"), KeyboardInterrupt()], ids=repr)
def test_strangers_pass_through(stranger):
    with pytest.raises(type(stranger)) as seen, translated("upload", URL):
        raise stranger
    assert seen.value is stranger


def test_a_refusal_of_one_key_among_many():
    """What obstore says of DeleteObjects, which answers 200 and names each key that it refused."""
    text = "Generic S3 error: DeleteObjects request failed for key k: Access Denied (code: AccessDenied)"
    assert isinstance(translate(foreign.GenericError(text), "delete", "s3://b/k"), PermissionDenied)


def test_what_cannot_be_opened_is_no_fault_of_the_network():
    ours = translate(foreign.GenericError("Generic MicrosoftAzure error: Invalid Access Key"), "open", "az://c/run")
    assert type(ours) is FixRequest


@pytest.mark.parametrize("code", ["InvalidObjectState", "BlobArchived", "BlobBeingRehydrated"])
def test_an_archived_object_is_not_asked_for_again(code):
    ours = translate(answer(403 if code.startswith("Invalid") else 409, code), "read", URL)
    assert not isinstance(ours, TryAgain | PermissionDenied | AlreadyExists)
    assert "archive" in ours.message


@pytest.mark.parametrize(
    "words",
    [
        "SSL: WRONG_VERSION_NUMBER] wrong version number",
        "Connect, source: received corrupt message of type InvalidContentType",
    ],
)
def test_tls_where_there_is_none(words):
    assert "(no TLS there)" in unanswered("get", URL, words).message
