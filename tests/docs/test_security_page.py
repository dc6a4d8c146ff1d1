"""The page shows the policies as they are in their files, and these allow no more than they say."""

import json
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "security.md").read_text()
POLICIES = sorted((DOCS / "policies").glob("*.json"))


def test_every_policy_is_shown_as_it_is():
    shown = dict(re.findall(r"\]\(policies/([\w-]+\.json)\)\n\n```json\n(.*?)```", PAGE, re.DOTALL))
    assert shown == {path.name: path.read_text() for path in POLICIES}


@pytest.mark.parametrize("path", [path for path in POLICIES if "collector" not in path.name], ids=lambda p: p.stem)
def test_only_collectors_delete_data(path):
    document = json.loads(path.read_text())
    allowed = [s for s in document.get("Statement", []) if s["Effect"] == "Allow"]
    granted = [action for s in allowed for action in s["Action"]]
    granted += document.get("includedPermissions", []) + document.get("DataActions", [])
    deletes = [action for action in granted if "delete" in action.lower() or action.endswith("*")]
    assert deletes == (["storage.objects.delete"] if path.stem == "gcs-register" else [])


@pytest.mark.parametrize("path", [path for path in POLICIES if path.stem.startswith("aws-")], ids=lambda p: p.stem)
def test_aws_policies_name_one_bucket(path):
    text = path.read_text()
    assert "BUCKET" in text or "PREFIX" in text
    assert not re.search(r'"Resource": \[\s*"\*"', text)
