"""What a manager is told once, and what it tells of each save and load."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from ckpt_cloud.encryption import Keyring
from ckpt_cloud.errors import InvalidOption
from ckpt_cloud.events import Listener, Report, fan_out
from ckpt_cloud.manager.policies import Policy
from ckpt_cloud.manager.save_policies import SavePolicy, waits_for_signals
from ckpt_cloud.reader import ObjectStoreReader
from ckpt_cloud.session import Settings
from ckpt_cloud.signing import Signer, Trust, TrustedKey
from ckpt_cloud.stores import Location
from ckpt_cloud.trace import Trace
from ckpt_cloud.writer import ObjectStoreWriter

log = logging.getLogger(__name__)

WhenBusy = Literal["wait", "skip", "refuse"]


@dataclass(frozen=True, slots=True)
class Finished:
    """A save or load of a manager that ended well, on this rank.

    Attributes:
        kind: `save` or `load`.
        step: None for an initial load from elsewhere.
        report: its figures.
    """

    kind: Literal["save", "load"]
    step: int | None
    url: str
    rank: int
    report: Report


@dataclass(frozen=True, slots=True)
class Plugs:
    """Makes the writer of each save and the reader of each load."""

    settings: Settings
    progress: bool
    trust: bool
    signer: Signer | None
    trusted_keys: TrustedKey | Iterable[TrustedKey] | None
    keyring: Keyring
    require_encryption: bool
    verify: bool
    on_event: Listener | None
    on_finished: Callable[[Finished], None] | None

    def __post_init__(self) -> None:
        # Refused now, not when a load begins.
        Trust.of(self.trusted_keys, None, verify=self.verify)

    def writer(
        self, location: Location, trace: Trace | None, *, overwrite: bool, metrics: Any, user_metadata: Any
    ) -> ObjectStoreWriter:
        """For one save."""
        return ObjectStoreWriter(
            location.url,
            overwrite=overwrite,
            store=self.settings.store,
            transfer=self.settings.transfer,
            commit=self.settings.commit,
            sign=self.signer,
            encryption_key=self.keyring,
            on_event=fan_out(self.on_event, trace),
            progress=self.progress,
            metrics=metrics,
            user_metadata=user_metadata,
        )

    def reader(self, location: Location, trace: Trace | None, *, cast: bool) -> ObjectStoreReader:
        """For one load."""
        return ObjectStoreReader(
            location.url,
            store=self.settings.store,
            transfer=self.settings.transfer,
            cast=cast,
            trust=self.trust,
            trusted_keys=self.trusted_keys,
            encryption_key=self.keyring,
            require_encryption=self.require_encryption,
            verify=self.verify,
            on_event=fan_out(self.on_event, trace),
            progress=self.progress,
        )

    def tell(self, finished: Finished) -> None:
        """Calls the user's callback; what it raises is logged, since the save itself is done."""
        if self.on_finished is not None:
            try:
                self.on_finished(finished)
            except Exception:
                log.exception("on_finished failed for %s", finished.url)


def checked_step(step: int) -> int:
    """`step`, if it is one.

    Raises:
        InvalidOption: it is no int of 0 or more.
    """
    if type(step) is not int or step < 0:
        raise InvalidOption(f"step is {step!r}; it must be an int of 0 or more")
    return step


def check_options(when_busy: str, prefix: str, keep: object, save_when: object, sigterm_grace_s: float | None) -> None:
    """Refuses what would fail later."""
    if not isinstance(keep, Policy | None):
        raise InvalidOption(f"keep is {keep!r}; it must be a policy, such as LastN(3)")
    if not isinstance(save_when, SavePolicy | None):
        raise InvalidOption(f"save_when is {save_when!r}; it must be a policy, such as SaveEveryNSteps(1000)")
    if sigterm_grace_s is None and waits_for_signals(save_when):
        raise InvalidOption("SaveOnPreemption waits for a signal to which nobody listens", hint="give sigterm_grace_s=")
    if when_busy not in ("wait", "skip", "refuse"):
        raise InvalidOption(f"when_busy is {when_busy!r}; it must be 'wait', 'skip' or 'refuse'")
    if "/" in prefix or prefix in ("data", "rank-"):
        raise InvalidOption(f"prefix is {prefix!r}; checkpoints need names of their own, without a slash")
