"""scripts/docs: the reference has every public name, the site builds without a warning, and it needs no other host."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from doc_pages import ROOT

import ckpt_cloud


def test_the_reference_is_complete():
    named = re.findall(r"^::: ckpt_cloud\.(\w+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(name for name in ckpt_cloud.__all__ if not name.startswith("__"))


class Loads(HTMLParser):
    """What a browser fetches by itself with a page."""

    def __init__(self):
        super().__init__()
        self.urls = []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag in {"script", "img", "iframe", "source"}:
            self.urls.append(given.get("src") or "")
        if tag == "link" and given.get("rel") != "canonical":
            self.urls.append(given.get("href") or "")


def test_the_site_builds(tmp_path):
    for package in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(package, reason="pip install --group docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path / "site"]
    # Nothing may be fetched while it is built.
    nowhere = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), "http://127.0.0.1:9")
    environment = os.environ | nowhere | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=150)
    assert built.returncode == 0, built.stdout + built.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 25
    loads = Loads()
    for page in pages:
        loads.feed(page.read_text())
    assert [url for url in loads.urls if "//" in url] == []
    sheets = "".join(sheet.read_text() for sheet in (tmp_path / "site").rglob("*.css"))
    assert re.findall(r"(?:url\(|@import )[\"']?https?:[^)\"']*", sheets) == []
    reference = (tmp_path / "site/api.html").read_text()
    assert [name for name in ckpt_cloud.__all__ if name[0] != "_" and f'id="ckpt_cloud.{name}"' not in reference] == []
