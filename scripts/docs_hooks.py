"""What mkdocs.yml has done to each page: links to files outside docs/ become their names in the repository."""

from __future__ import annotations

import re
from typing import Any


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """GitHub shows such links; the site has no pages for them."""
    up = page.file.src_uri.count("/") + 1
    outside = re.compile(rf"\[([^\]]+)\]\((?:\.\./){{{up}}}([\w./-]+)(?:#[\w-]+)?\)")
    return outside.sub(lambda found: f"{found[1]} (`{found[2]}` in the repository)", markdown)
