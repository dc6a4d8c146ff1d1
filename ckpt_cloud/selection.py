"""Loading a part of a checkpoint, or under other names: a load planner on top of DCP's own.

set_up_planner       DCP's flattens the state ─► only the keys that were chosen stay
create_local_plan    DCP's plans against the stored entries, shown under the state's names ─► stored names put back
create_global_plan   keys of all ranks ─► what is missing, what is left over ─► an error on all ranks, or the result
finish_plan          each rank takes the result
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem

from ckpt_cloud.errors import InvalidOption, StateMismatch

Keys = str | Iterable[str] | Callable[[str], bool]
"""Names or dotted prefixes (`"model"` is all of `model.…`), or whether a key is wanted."""
Rename = Mapping[str, str] | Callable[[str], str]
"""From the state's names or dotted prefixes to the checkpoint's, or a function that tells the checkpoint's name."""

_SHOWN = 10


@dataclass(frozen=True, slots=True)
class LoadResult:
    """Which keys found no counterpart in a load, over all ranks, sorted; both without what `keys` left out.

    Attributes:
        missing_keys: in the state of a rank, under the state's names, but not in the checkpoint; left as they were.
        unexpected_keys: in the checkpoint, under its own names, but in no rank's state.
    """

    missing_keys: tuple[str, ...] = ()
    unexpected_keys: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Seen:
    """What one rank tells the coordinator."""

    used: list[str]
    """Stored names that its state takes."""
    missing: dict[str, str]
    """Stored names that are not there, by the state's."""
    faults: list[str] = field(default_factory=list)
    """Entries that do not fit."""
    idle: frozenset[str] = frozenset()
    """Of `keys`: what chose nothing."""


class SelectiveLoadPlanner(DefaultLoadPlanner):
    """DCP's `DefaultLoadPlanner` for a part of the state, and for checkpoints with other names in them.

    `ckpt_cloud.load` makes one from its arguments; give it as `planner=` to DCP's own functions.

    Args:
        keys: which keys of the state to load: a name or dotted prefix, several of them, or a predicate. All others
            stay as they are. All by default.
        rename: where the checkpoint has other names: `{"backbone": "model.encoder"}` loads `backbone.…` of the state
            from `model.encoder.…`. The longest prefix wins; `""` is the prefix of everything. Or a function from the
            state's name to the checkpoint's.
        strict: None, as DCP: a key that is missing in the checkpoint is an error, one that only the checkpoint has
            is not. True, as `torch.nn.Module.load_state_dict`: both are. False: neither is.
        flatten_state_dict, flatten_sharded_tensors: as DCP's.

    Raises:
        InvalidOption: at once.
        StateMismatch: on every rank; lists all keys and shapes of all ranks that do not fit. Nothing was changed.
    """

    def __init__(
        self,
        keys: Keys | None = None,
        rename: Rename | None = None,
        strict: bool | None = None,
        *,
        flatten_state_dict: bool = True,
        flatten_sharded_tensors: bool = True,
    ) -> None:
        # What is missing is told for all ranks at once, by the coordinator.
        super().__init__(flatten_state_dict, flatten_sharded_tensors, allow_partial_load=True)
        self._names = _names(keys)
        self._predicate = keys if callable(keys) else None
        self._renames = _renames(rename)
        self._plain = keys is None and rename is None
        self._strict = strict
        # Set by every load.
        self._idle: frozenset[str] = frozenset()
        self.result = LoadResult()

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,  # noqa: FBT002 - DCP's signature
    ) -> None:
        """Takes the chosen keys of the state."""
        super().set_up_planner(state_dict, metadata, is_coordinator)
        self.result = LoadResult()
        self.state_dict = {fqn: value for fqn, value in self.state_dict.items() if self._wanted(fqn)}
        self._idle = frozenset(n for n in self._names or () if not any(_below(fqn, n) for fqn in self.state_dict))

    def create_local_plan(self) -> LoadPlan:
        """DCP's plan, with what this rank has to tell of its keys."""
        assert self.metadata is not None, "DCP sets the planner up with the metadata"
        stored = self.metadata.state_dict_metadata
        names = {fqn: self._stored_name(fqn) for fqn in self.state_dict}
        shown = stored if self._plain else {fqn: stored[name] for fqn, name in names.items() if name in stored}
        faults = misfits(self.state_dict, shown)
        fitting = {fqn: entry for fqn, entry in shown.items() if fqn not in faults} if faults else shown
        plan = self._planned(fitting)
        # DCP's planner may have gone over to the names of before torch 2.4.
        names = {fqn: names.get(fqn, fqn) for fqn in self.state_dict}
        seen = _Seen(
            used=[name for name in names.values() if name in stored],
            missing={fqn: name for fqn, name in names.items() if name not in stored},
            faults=list(faults.values()),
            idle=self._idle,
        )
        items = [_reading(item, names[item.dest_index.fqn]) for item in plan.items]
        return dataclasses.replace(plan, items=items, planner_data=seen)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """DCP's plans, with what was found of the keys of all ranks.

        Raises:
            StateMismatch: some do not fit.
        """
        assert self.metadata is not None, "DCP sets the planner up with the metadata"
        seen: list[_Seen] = [plan.planner_data for plan in global_plan]
        used = {name for one in seen for name in one.used}
        missing = {fqn: name for one in seen for fqn, name in one.missing.items()}
        unexpected = [
            name
            for name in self.metadata.state_dict_metadata
            if name not in used and self._wanted(self._state_name(name))
        ]
        result = LoadResult(tuple(sorted(missing)), tuple(sorted(unexpected)))
        faults = sorted({fault for one in seen for fault in one.faults})
        idle = frozenset.intersection(*(one.idle for one in seen))
        self._refuse(result, missing, faults, sorted(idle))
        plans = super().create_global_plan(global_plan)
        return [dataclasses.replace(plan, planner_data=result) for plan in plans]

    def finish_plan(self, new_plan: LoadPlan) -> LoadPlan:
        """The plan as it is; `result` is set from here on."""
        self.result = new_plan.planner_data
        return super().finish_plan(new_plan)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """As DCP's, into the state itself.

        DCP's may put it into a copy without flattening, and beside the old value where a key is not a string.
        """
        self.load_value(read_item, torch.load(value, weights_only=False))  # noqa: TID251 - screened by our reader

    def load_value(self, read_item: ReadItem, value: Any) -> None:
        """`load_bytes` of a value that is there already, so that nothing is pickled only to be opened again."""
        fqn = read_item.dest_index.fqn
        *outer, last = self.mappings[fqn] if self.flatten_state_dict else (fqn,)
        container: Any = self.original_state_dict
        for step in outer:
            container = container[_key(container, step)]
        container[_key(container, last)] = value

    def _planned(self, shown: dict[str, Any]) -> LoadPlan:
        """DCP's plan against these entries."""
        metadata = self.metadata
        assert metadata is not None
        self.metadata = dataclasses.replace(metadata, state_dict_metadata=shown)
        try:
            return super().create_local_plan()
        finally:
            self.metadata = metadata

    def _refuse(self, result: LoadResult, missing: dict[str, str], faults: list[str], idle: list[str]) -> None:
        said = list(faults)
        if self._strict is not False:
            said += [f"keys: nothing in the state is {name!r} or below it" for name in idle]
            said += [
                f"{fqn} is not in the checkpoint" + (f" as {missing[fqn]}" if missing[fqn] != fqn else "")
                for fqn in result.missing_keys
            ]
        if self._strict:
            said += [f"{name} is not in the state" for name in result.unexpected_keys]
        if said:
            meta = self.metadata.storage_meta if self.metadata else None
            error = mismatch(said, str(meta.checkpoint_id) if meta and meta.checkpoint_id else "")
            error.missing_keys, error.unexpected_keys = result.missing_keys, result.unexpected_keys
            raise error

    def _wanted(self, fqn: str) -> bool:
        if self._predicate is not None:
            return self._predicate(fqn)
        return self._names is None or any(_below(fqn, name) for name in self._names)

    def _stored_name(self, fqn: str) -> str:
        return self._renames(fqn) if callable(self._renames) else _moved(fqn, self._renames)

    def _state_name(self, name: str) -> str:
        """What the state would call a stored key; a function cannot be turned round, so the same then."""
        return name if callable(self._renames) else _moved(name, [(old, new) for new, old in self._renames])


def _key(container: Any, step: str | int) -> Any:
    """What DCP's path means, which tells all keys of mappings as strings, such as those of an optimizer's state."""
    if not isinstance(container, Mapping) or step in container:
        return step
    return next((key for key in container if str(key) == step), step)


def mismatch(faults: list[str], url: str) -> StateMismatch:
    """An error that says the first of the faults, and all of them in a note."""
    more = f" and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
    hint = "load into the state that was saved, or choose with keys=, rename= and strict=False of ckpt_cloud.load"
    error = StateMismatch(f"state and checkpoint differ: {'; '.join(faults[:_SHOWN])}{more}", url, hint)
    if more:
        error.add_note("\n".join(faults))
    return error


def misfits(state: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, str]:
    """Where a flat state and what is stored of it have other shapes or kinds, by key."""
    found = {fqn: _misfit(value, stored[fqn]) for fqn, value in state.items() if fqn in stored}
    return {fqn: f"{fqn}: {fault}" for fqn, fault in found.items() if fault}


def _misfit(value: Any, entry: Any) -> str | None:
    if not isinstance(entry, TensorStorageMetadata):
        return None
    if isinstance(value, torch.Tensor):
        shape = value.shape
    else:
        size = getattr(value, "size", None)
        if not callable(size):
            return f"stored as a tensor of shape {tuple(entry.size)}, state has {type(value).__name__}"
        shape = torch.Size(size())
    return None if shape == entry.size else f"stored shape {tuple(entry.size)}, state {tuple(shape)}"


def _reading(item: ReadItem, name: str) -> ReadItem:
    if item.storage_index.fqn == name:
        return item
    return dataclasses.replace(item, storage_index=dataclasses.replace(item.storage_index, fqn=name))


def _below(fqn: str, prefix: str) -> bool:
    return prefix in ("", fqn) or fqn.startswith(f"{prefix}.")


def _moved(fqn: str, prefixes: Collection[tuple[str, str]]) -> str:
    """`fqn` with the longest of the prefixes that it has replaced."""
    if not prefixes:
        return fqn
    fitting = [pair for pair in prefixes if _below(fqn, pair[0])]
    if not fitting:
        return fqn
    old, new = max(fitting, key=lambda pair: len(pair[0]))
    rest = fqn[len(old) :].removeprefix(".")
    return f"{new}.{rest}" if new and rest else new or rest


def _names(keys: Keys | None) -> tuple[str, ...] | None:
    if keys is None or callable(keys):
        return None
    names = (keys,) if isinstance(keys, str) else tuple(keys)
    if not all(isinstance(name, str) for name in names):
        raise InvalidOption("keys must be names, or one function from a name to whether it is wanted")
    return names


def _renames(rename: Rename | None) -> list[tuple[str, str]] | Callable[[str], str]:
    if callable(rename):
        return rename
    pairs = list((rename or {}).items())
    if not all(isinstance(name, str) for pair in pairs for name in pair):
        raise InvalidOption("rename must map the state's names to the checkpoint's, or be a function that does")
    return pairs
