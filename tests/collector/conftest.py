"""Saves, loads and what is stored, on `memory://`, for what crashes and collectors do to them."""

import secrets

import pytest
import torch

import ckpt_cloud
from ckpt_cloud import bridge
from ckpt_cloud.format import manifest as manifests
from ckpt_cloud.format import register as registers
from ckpt_cloud.format.layout import place_of
from ckpt_cloud.options import StoreOptions
from ckpt_cloud.stores import open_store, parse_url

QUICK = ckpt_cloud.CommitOptions(deadline_s=0.2, pause_s=0.001, max_pause_s=0.01)


def state(value):
    return {"w": torch.full((500,), float(value)), "note": f"step {value}"}


class Run:
    """Checkpoints under one root, each known by its name and the value that it holds."""

    def __init__(self, root):
        self.root = root
        self._store = open_store(parse_url(root), StoreOptions())

    def url(self, name):
        return f"{self.root}/{name}"

    def save(self, name, value, *, overwrite=False):
        writer = ckpt_cloud.ObjectStoreWriter(self.url(name), overwrite=overwrite, commit=QUICK)
        ckpt_cloud.save(state(value), storage_writer=writer)

    def load(self, name):
        """The value, or the type of the error; never a mixture."""
        loaded = state(-1)
        try:
            ckpt_cloud.load(loaded, checkpoint_id=self.url(name))
        except ckpt_cloud.CkptCloudError as error:
            return type(error)
        value = int(loaded["w"][0])
        assert loaded["w"].eq(value).all()
        assert loaded["note"] == f"step {value}"
        return value

    def stored(self):
        async def listed():
            return sorted([info.key async for info in self._store.list()])

        return bridge.run(listed())

    def needed(self):
        """Keys that some committed checkpoint names, and all registers."""
        needed = set()
        for key in self.stored():
            place = place_of(key)
            if place is None or place[1]:
                continue
            needed.add(key)
            register = registers.decode(self.read(key), key)
            if register.manifest is not None:
                path = f"{place[0]}/" if place[0] else ""
                body = self.read(path + register.manifest.key)
                manifest = manifests.decode(body, register.manifest, key)
                needed |= {path + register.manifest.key, *(path + entry.key for entry in manifest.objects)}
        return needed

    def register(self, name):
        """That of a checkpoint, None where there is none."""
        key = f"{name}/COMMIT"
        return registers.decode(self.read(key), key) if key in self.stored() else None

    def read(self, key):
        return bridge.run(self._store.get(key, limit=1 << 30))[0]

    def remove(self, key):
        bridge.run(self._store.delete([key]))

    def put(self, key, data=b"x"):
        bridge.run(self._store.put(key, data))


@pytest.fixture
def new_run():
    """Makes empty runs, in memory unless a URL is given."""
    return lambda url=None: Run(url or f"memory://{secrets.token_hex(6)}/run")


@pytest.fixture
def run(new_run):
    return new_run()
