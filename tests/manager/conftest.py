"""Managers on `memory://`, and states whose value tells which step they are of."""

import secrets

import pytest
import torch

import ckpt_cloud


@pytest.fixture
def root():
    return f"memory://{secrets.token_hex(6)}/run"


@pytest.fixture
def manage(root):
    """Makes managers, all closed after the test; what one fails with then is the test's business."""
    made = []

    def manage(url=None, **options):
        made.append(ckpt_cloud.CheckpointManager(url or root, **options))
        return made[-1]

    yield manage
    for manager in made:
        manager.close()


def state(value):
    return {
        "model": {"w": torch.full((500,), float(value))},
        "optimizer": {"m": torch.full((7,), float(value))},
        "n": value,
    }


@pytest.fixture
def made():
    """`made(value)` is a state of that value."""
    return state


@pytest.fixture
def settled():
    """Waits until a manager's background work is done."""

    def settled(manager):
        assert manager._janitor.wait(60)

    return settled
