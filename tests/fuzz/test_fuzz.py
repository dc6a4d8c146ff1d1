"""Damage to every part of a checkpoint: an error of ours each time, no crash, no hang, no memory for what it claims.

`scripts/fuzz` does the same for hours.
"""

import logging
import random
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_cloud.errors import ChecksumMismatch, CkptCloudError, CorruptManifest, MissingObject
from tests import forge
from tests.fuzz.mutate import mutated, scrambled
from tests.fuzz.targets import TARGETS, _state, coded_seed, commit, is_finding, load, saved, untouched
from tests.fuzz.targets import seed as valid

MEMORY_MAX = 64 << 20

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def quiet():
    """DCP logs each failure to read metadata with its traceback."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


def test_the_seed_is_whole():
    for manifest in (untouched(), forge.in_one_piece(valid().fields)):
        commit(manifest)
        assert saved(load()) == saved(_state())
    root, contents = forge.taken_apart(untouched())
    assert forge.closed(*forge.with_pages(root, contents)) == untouched()
    assert min(len(contents[kind]) for kind in ("tensors", "items", "paths")) > 1


@pytest.mark.parametrize("kind", ["frames", "stream"])
def test_the_coded_seeds_are_whole(kind):
    found = coded_seed(kind)
    for manifest in (found.manifest, forge.in_one_piece(found.fields)):
        commit(manifest, found)
        assert saved(load(found.url)) == saved(_state())
    assert len(found.packs) > 2


@pytest.fixture(scope="module")
def memory():
    """Traced once for all: beside obstore's threads each stop may crash the interpreter (CPython issue 128679)."""
    tracemalloc.start()
    yield
    tracemalloc.stop()


QUICK = {"manifest", "manifest_bytes", "commit", "header", "sealed", "coded", "item", "dcp_metadata", "safetensors"}


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in sorted(TARGETS)]
)
@given(chance=st.integers(0, 2**62))
def test_damage_is_an_error_of_ours(name, chance):
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        TARGETS[name](random.Random(chance))
    except CkptCloudError as error:
        if is_finding(error):
            raise
    assert tracemalloc.get_traced_memory()[1] - before < MEMORY_MAX


def outcome(call):
    try:
        call()
    except CkptCloudError as error:
        return type(error)
    return None


@pytest.mark.slow
def test_the_damage_is_damage():
    """Of the mutations many must be noticed, or the fuzzer would prove nothing."""
    found = {
        name: [outcome(lambda n=n, target=target: target(random.Random(n))) for n in range(60)]
        for name, target in TARGETS.items()
    }
    noticed = {name: sum(each is not None for each in outcomes) for name, outcomes in found.items()}
    assert min(noticed.values()) >= 5, noticed
    assert {CorruptManifest, MissingObject} & set(found["manifest"])
    assert ChecksumMismatch in found["pack"]


def test_mutations_do_not_touch_their_source():
    before = repr(valid().fields)
    for number in range(300):
        mutated(random.Random(number), valid().fields)
        scrambled(random.Random(number), b"abc")
    assert repr(valid().fields) == before
