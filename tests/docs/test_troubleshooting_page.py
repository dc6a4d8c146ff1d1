"""The page on troubleshooting quotes messages that there are, and leaves out no error that users meet."""

import ast
import re

from doc_pages import ROOT

from ckpt_cloud import errors

PAGE = (ROOT / "docs/troubleshooting.md").read_text()
ROWS = re.findall(r"^\| `([^`]+)` \| `(\w+)` \| (.+) \|$", PAGE, re.MULTILINE)


def all_text():
    """Every string of the package, f-strings with `…` for their values; errors' own docstrings are no messages."""
    found = []
    for path in sorted((ROOT / "ckpt_cloud").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and path.name != "errors.py":
                found.append(node.value)
    return found


def leaves(error):
    children = [child for child in error.__subclasses__() if child.__module__ == errors.__name__]
    below = {leaf for child in children for leaf in leaves(child)}
    return below if error.__name__ in CATEGORIES else {error, *below}


CATEGORIES = {"CkptCloudError", "TryAgain", "FixRequest", "ChooseAnother", "Damaged"}
TRANSLATED = {"StoreError", "NotFound", "AlreadyExists", "PreconditionFailed", "RangeNotSatisfiable"}
"""What a single operation on a store answers; users of checkpoints meet what it is translated into."""


def test_every_message_is_one_that_is_raised():
    texts = all_text()
    patterns = {message: re.compile(".*".join(map(re.escape, message.split("…")))) for message, _, _ in ROWS}
    assert len(ROWS) > 45
    gone = [message for message, each in patterns.items() if not any(map(each.search, texts))]
    assert gone == []


def test_every_error_that_users_meet_is_there():
    met = {error.__name__ for error in leaves(errors.CkptCloudError)} - TRANSLATED
    explained = {error for _, error, _ in ROWS}
    assert explained <= met
    page = (ROOT / "docs/errors.md").read_text()
    assert {name for name in met - explained if f"`{name}`" not in page} == set()
    # Those have nothing to be done about but what their message says.
    assert met - explained <= {"SliceOutOfBounds"}
