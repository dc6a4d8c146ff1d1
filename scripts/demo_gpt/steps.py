"""Names of the checkpoints under a run's URL."""

from __future__ import annotations


def step_name(step: int) -> str:
    return f"step-{step:06d}"


def step_of(url: str) -> int:
    return int(url.rsplit("-", 1)[1])
