"""The error tree: one root, picklable between ranks, a stable `kind` each, and a line in the docs."""

import copy
import inspect
import pickle
import re
from pathlib import Path

import pytest

from ckpt_cloud import errors
from ckpt_cloud.errors import CkptCloudError

ROOT = Path(__file__).parents[2]


def tree(root: type[CkptCloudError]) -> list[type[CkptCloudError]]:
    return [root, *(error for child in root.__subclasses__() for error in tree(child))]


# A class may hang in two places of the tree, and other test modules may make their own.
# ckpt_cloud.testing has errors of its own, for tests alone.
TREE = [
    error
    for error in dict.fromkeys(tree(CkptCloudError))
    if error.__module__.partition(".")[0] == "ckpt_cloud" and not error.__module__.startswith("ckpt_cloud.testing")
]


def test_one_root():
    strangers = [
        error
        for _, error in inspect.getmembers(errors, inspect.isclass)
        if issubclass(error, BaseException)
        and error.__module__.startswith("ckpt_cloud")
        and not issubclass(error, CkptCloudError)
    ]
    assert not strangers
    assert len(TREE) > 1


def test_every_error_lives_in_errors():
    assert [error.__name__ for error in TREE if getattr(errors, error.__name__, None) is not error] == []


def test_kinds_are_unique():
    kinds = {error: error.__dict__.get("kind") for error in TREE}
    assert [error.__name__ for error, kind in kinds.items() if not kind] == []
    assert len(set(kinds.values())) == len(TREE)
    assert [kind for kind in kinds.values() if not re.fullmatch(r"[a-z]+(-[a-z]+)*", kind)] == []


@pytest.mark.parametrize("error", TREE, ids=lambda error: error.__name__)
@pytest.mark.parametrize("travel", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy], ids=["pickle", "copy"])
def test_round_trip(error, travel):
    sent = error("what failed", url="s3://bucket/run/step-1", hint="try that")
    sent.add_note("seen on rank 3")

    got = travel(sent)

    assert type(got) is error
    assert (got.message, got.url, got.hint) == ("what failed", "s3://bucket/run/step-1", "try that")
    assert str(got) == str(sent)
    assert got.__notes__ == ["seen on rank 3"]


@pytest.mark.parametrize("error", TREE, ids=lambda error: error.__name__)
def test_message_url_and_hint_are_shown(error):
    shown = str(error("what failed", url="s3://bucket/run", hint="try that"))
    for part in ("what failed", "s3://bucket/run", "try that"):
        assert part in shown


@pytest.mark.parametrize("error", TREE, ids=lambda error: error.__name__)
def test_no_secret_is_kept(error):
    url = "https://user:hunter2@host/bucket/key?X-Amz-Signature=hunter2"
    failure = error(f"GET {url} failed", url=url)
    assert b"hunter2" not in pickle.dumps(failure)
    assert "hunter2" not in f"{failure} {failure!r}"


@pytest.mark.parametrize("error", TREE, ids=lambda error: error.__name__)
def test_documented(error):
    assert (error.__doc__ or "").strip()
    assert re.search(rf"\b{error.__name__}\b", errors.__doc__), "missing in the tree that opens errors.py"
    page = (ROOT / "docs" / "errors.md").read_text()
    assert re.search(rf"`{error.__name__}`|\b{error.__name__}\b", page), "missing in docs/errors.md"
    assert error.kind in page, "its kind is missing in docs/errors.md"


def test_docs_name_no_error_that_is_gone():
    page = (ROOT / "docs" / "errors.md").read_text()
    tree_block = re.search(r"^ *CkptCloudError\n(?: *[├└│].*\n)+", page, re.MULTILINE)
    assert tree_block, "docs/errors.md should show the tree"
    named = set(re.findall(r"[├└]── (\w+)", tree_block[0]))
    assert named == {error.__name__ for error in TREE} - {"CkptCloudError"}
