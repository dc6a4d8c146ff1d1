"""What a user may have meant: names near a mistyped one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import replace

from ckpt_cloud import bridge
from ckpt_cloud.catalog import describe
from ckpt_cloud.errors import CheckpointIncomplete, CheckpointNotFound, CheckpointPerRank, CkptCloudError, InvalidURL
from ckpt_cloud.options import StoreOptions
from ckpt_cloud.stores import Location, open_store, parse_url
from ckpt_cloud.stores.location import SCHEMES

_AT_MOST = 3
_NUMBERED = re.compile(r"(.*?)([0-9]+)")


def with_suggestion(error: CkptCloudError, urls: Sequence[str]) -> CkptCloudError:
    """The same error, with what is near the one of `urls` that it is about in its hint, if anything is."""
    if isinstance(error, InvalidURL):
        found = [each for url in urls if _location(url) is None for each in near_schemes(url)]
        more = error.hint
    elif isinstance(error, CheckpointNotFound) and not isinstance(error, CheckpointIncomplete | CheckpointPerRank):
        places = [place for url in urls if (place := _location(url)) is not None and place.url == error.url]
        found = near(places[0]) if places else []
        more = "ckpt-cloud ls ROOT lists what is there"
    else:
        return error
    if not found:
        return error
    hint = f"did you mean {' or '.join(found)}?"
    return type(error)(error.message, error.url, f"{hint}\n{more}" if more else hint)


def near(location: Location) -> list[str]:
    """URLs that are there and look like `location`, or lie right under it, best first."""
    parent, name = location, ""
    names = _children(location)
    while not names and parent.path.strip("/"):
        parent, name = _above(parent)
        names = _children(parent)
    likely = best(name, names) if name else sorted(names, key=_by_number, reverse=True)
    return [parent.child(each).url for each in likely if _is_there(parent.child(each))][:_AT_MOST]


def check_not_empty(url: str, what: str) -> None:
    """For commands that look below a URL and found nothing: perhaps it is a mistyped one.

    Raises:
        CheckpointNotFound: not an object lies there.
    """
    location = parse_url(url)
    store = open_store(location, StoreOptions(), first_contact=True)
    if not bridge.run(store.list_children()) and bridge.run(describe(store, location)).state == "incomplete":
        raise CheckpointNotFound(what, location.url)


def best(name: str, names: Sequence[str]) -> list[str]:
    """Of `names`, those most like `name`; of numbered ones with the same beginning, those of near numbers."""
    asked = _NUMBERED.fullmatch(name)
    if asked:
        numbered = [found for each in names if (found := _NUMBERED.fullmatch(each)) and found[1] == asked[1]]
        if numbered:
            return [found[0] for found in sorted(numbered, key=lambda f: abs(int(f[2]) - int(asked[2])))]
    return difflib.get_close_matches(name, names, _AT_MOST, 0.5)


def near_schemes(url: str) -> list[str]:
    """The same URL with a scheme that exists."""
    scheme, separator, rest = url.partition("://")
    if separator and scheme.lower() in SCHEMES:
        return []
    if not separator:
        found = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):/*(.*)", url)
        scheme, rest = (found[1], found[2]) if found else ("", "")
    likely = difflib.get_close_matches(scheme.lower(), SCHEMES, 1, 0.4) if scheme else []
    return [f"{each}://{rest}" for each in likely]


def _location(url: str) -> Location | None:
    try:
        return parse_url(url)
    except CkptCloudError:
        return None


def _above(location: Location) -> tuple[Location, str]:
    parent, _, name = location.path.rpartition("/")
    return replace(location, path=parent or ("/" if location.scheme == "file" else "")), name


def _by_number(name: str) -> tuple[str, int]:
    numbered = _NUMBERED.fullmatch(name)
    return (numbered[1], int(numbered[2])) if numbered else (name, 0)


def _is_there(location: Location) -> bool:
    """Whether a committed checkpoint, or something with one below, may be there."""
    try:
        store = open_store(location, StoreOptions(), first_contact=True)
        return bridge.run(describe(store, location)).state not in ("deleted", "aborted")
    except CkptCloudError:
        return False


def _children(location: Location) -> list[str]:
    try:
        return list(bridge.run(open_store(location, StoreOptions(), first_contact=True).list_children()))
    except CkptCloudError:
        return []
