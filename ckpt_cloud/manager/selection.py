"""A part of a state dict by patterns: model only, or all but the optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Self

from ckpt_cloud.errors import InvalidOption

StateDict = dict[str, Any]


def select(state: StateDict, *, only: Iterable[str] = (), exclude: Iterable[str] = ()) -> StateDict:
    """A dict of its own with the selected entries of `state`; the values are the same objects.

    Args:
        only: patterns, as in `fnmatch`, of dotted paths: `model`, `model.head.*`, `*.bias`. A path below a match
            matches too. Nothing given is everything.
        exclude: patterns of what is left out, whatever `only` says.

    Raises:
        InvalidOption: a pattern that fits nothing, or nothing is left.
    """
    wanted, unwanted = patterns(only), patterns(exclude)
    if not wanted and not unwanted:
        return state
    met: set[str] = set()
    selected = _walk(state, "", wanted, unwanted, met, inside=not wanted)
    idle = [pattern for pattern in (*wanted, *unwanted) if pattern not in met]
    if idle:
        hint = f"the state has {', '.join(sorted(map(str, state))[:10])}"
        raise InvalidOption(f"no key of the state fits {', '.join(map(repr, idle))}", hint=hint)
    if not selected:
        raise InvalidOption("the patterns leave nothing of the state")
    return selected


@dataclass(frozen=True, slots=True)
class Keys:
    """Which part of a state is meant."""

    only: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    @classmethod
    def of(cls, only: Iterable[str], exclude: Iterable[str]) -> Self:
        """From patterns as a user gives them."""
        return cls(patterns(only), patterns(exclude))

    def select(self, state: StateDict) -> StateDict:
        """That part of `state`."""
        return select(state, only=self.only, exclude=self.exclude)


def put_back(state: StateDict, selected: StateDict) -> None:
    """Values that a load replaced in `selected`, such as numbers, go to their places in `state`."""
    if selected is state:
        return
    for key, value in selected.items():
        if isinstance(value, dict) and isinstance(state.get(key), dict):
            put_back(state[key], value)
        else:
            state[key] = value


def patterns(given: Iterable[str]) -> tuple[str, ...]:
    """The patterns; a lone str is one, not its letters.

    Raises:
        InvalidOption: one is empty.
    """
    found = (given,) if isinstance(given, str) else tuple(given)
    if not all(found):
        raise InvalidOption("a pattern of keys is empty")
    return found


def _walk(
    state: StateDict, above: str, only: tuple[str, ...], exclude: tuple[str, ...], met: set[str], *, inside: bool
) -> StateDict:
    found: StateDict = {}
    for key, value in state.items():
        path = f"{above}.{key}" if above else str(key)
        out = [pattern for pattern in exclude if fnmatchcase(path, pattern)]
        hit = [pattern for pattern in only if fnmatchcase(path, pattern)]
        met.update(out, hit)
        taken = inside or bool(hit)
        if isinstance(value, dict) and not out:
            below = _walk(value, path, only, exclude, met, inside=taken)
            if below or (taken and not value):
                found[key] = below
        elif taken and not out:
            found[key] = value
    return found
