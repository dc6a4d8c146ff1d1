"""Publishing against a store whose answers are lost, refused, unclear, late or another's."""

import asyncio
import secrets
import time

import pytest

from ckpt_cloud import commit
from ckpt_cloud.commit import admit, move_register, open_manifest, publish, read_register
from ckpt_cloud.errors import (
    AlreadyExists,
    AttemptAborted,
    CheckpointDeleted,
    CheckpointExists,
    CheckpointIncomplete,
    CheckpointNotFound,
    CheckpointPerRank,
    CommitStateUnknown,
    CorruptCommit,
    CorruptManifest,
    NotFound,
    PermissionDenied,
    PreconditionFailed,
    RequestRefused,
    StaleWrite,
    StoreUnavailable,
    Throttled,
    Unsupported,
)
from ckpt_cloud.format import manifest as manifests
from ckpt_cloud.format import register as registers
from ckpt_cloud.format.layout import COMMIT_KEY, NO_ID, manifest_key
from ckpt_cloud.format.manifest import Manifest
from ckpt_cloud.format.register import ManifestRef, Register
from ckpt_cloud.options import CommitOptions, StoreOptions
from ckpt_cloud.protocol import Seen, fenced_off
from ckpt_cloud.stores import ANY, CREATE, open_store, parse_url
from ckpt_cloud.stores.capabilities import Capabilities

pytestmark = pytest.mark.timeout(60)

QUICK = CommitOptions(deadline_s=0.4, pause_s=0.005, max_pause_s=0.01)
NOTHING = Seen(None)


def id_(number):
    return f"{number:032x}"


def body(number):
    return Manifest(attempt=id_(number), writer="test", objects=[], tensors={}, items={})


def elsewhere():
    return f"memory://{secrets.token_hex(8)}/run/step-1"


class Faulty:
    """A store whose puts and gets of `COMMIT` do, one after another, what the scripts say; then they just work.

    Puts: `lost` is applied and not answered, `echo` applied and answered by a refusal, `dropped` neither,
    `late` not answered and applied a little later, `hangs` never answered, an error is that error.
    With a function in front, that one is awaited before the put; it may change the register.
    """

    def __init__(self, store, puts=(), gets=()):
        self.url = store.url
        self.store = store
        self.puts, self.gets = list(puts), list(gets)
        self.sent = []
        self.deleted = []
        self.later = []

    def __getattr__(self, name):
        return getattr(self.store, name)

    async def put(self, key, data, condition=ANY):
        if key != COMMIT_KEY:
            return await self.store.put(key, data, condition)
        self.sent.append(condition)
        fault = self.puts.pop(0) if self.puts else None
        if isinstance(fault, tuple):
            meanwhile, fault = fault
            await meanwhile(self.store)
        if fault == "late":
            self.later.append(asyncio.create_task(self._later(data, condition)))
        elif fault == "hangs":
            await asyncio.sleep(600)
        elif fault in ("lost", "echo", None):
            version = await self.store.put(key, data, condition)
        if fault == "echo":
            raise AlreadyExists("put: there already") if condition is CREATE else PreconditionFailed("put: changed")
        if fault in ("lost", "dropped", "late"):
            raise StoreUnavailable("put: reset", f"{self.url}/{key}")
        if fault is not None:
            raise fault
        return version

    async def get(self, key, *, limit):
        fault = self.gets.pop(0) if key == COMMIT_KEY and self.gets else None
        if fault == "hangs":
            await asyncio.sleep(600)
        if fault is not None:
            raise fault
        return await self.store.get(key, limit=limit)

    async def delete(self, keys):
        self.deleted += keys
        await self.store.delete(keys)

    async def _later(self, data, condition):
        await asyncio.sleep(0.02)
        try:
            await self.store.put(COMMIT_KEY, data, condition)
        except (AlreadyExists, PreconditionFailed):
            self.later.append("refused on arrival")


class Always(list):
    """A script that never ends."""

    def pop(self, index=-1):
        return self[0]


@pytest.fixture(params=["create", "replace"])
def start(request):
    """A place to publish to, and how."""

    async def begin(puts=(), gets=()):
        store = Faulty(open_store(parse_url(elsewhere()), StoreOptions()))
        seen = NOTHING
        if request.param == "replace":
            await send(store, 5, NOTHING, overwrite=False)
            seen = await read_register(store)
        store.sent.clear()
        store.puts, store.gets = puts, gets
        return store, seen, request.param == "replace"

    return begin


async def send(store, number, seen, *, overwrite, options=QUICK, oldest=None):
    oldest = id_(number if oldest is None else oldest)
    return await publish(store, body(number), oldest=oldest, seen=seen, overwrite=overwrite, options=options)


async def attempt_in(store):
    register = (await read_register(store)).register
    return register and register.attempt


async def test_what_is_published_can_be_opened(start):
    store, seen, overwrite = await start()
    register = await send(store, 10, seen, overwrite=overwrite)

    assert (await read_register(store)).register == register
    opened, data = await open_manifest(store)
    reference = opened.manifest
    assert reference == register.manifest
    assert reference.key == manifest_key(id_(10))
    assert manifests.decode(data, reference, store.url) == body(10)
    assert len(store.sent) == 1
    assert await store.list_children() == ["data"]


@pytest.mark.parametrize(
    ("puts", "gets", "sent"),
    [
        pytest.param(["lost"], [], 1, id="A5-lost-answer"),
        pytest.param(["echo"], [], 1, id="A3-refused-by-our-own-success"),
        pytest.param(["dropped"], [], 2, id="A5-dropped"),
        pytest.param(["dropped", "dropped", "lost"], [], 3, id="A5-dropped-twice-then-lost"),
        pytest.param([Throttled("put: slow down")], [], 2, id="A6-throttled"),
        pytest.param([StoreUnavailable("put: 409 conflict")], [], 2, id="A4-conflict"),
        pytest.param(["lost"], [StoreUnavailable("get: reset"), Throttled("get: slow down")], 1, id="A14-read-later"),
        pytest.param(["dropped", "echo"], [], 2, id="A3-refused-on-the-second"),
        pytest.param([NotFound("put: gone")], [], 2, id="A10-not-found-and-unchanged"),
    ],
)
async def test_committed_in_spite_of(start, puts, gets, sent):
    store, seen, overwrite = await start(list(puts), list(gets))
    register = await send(store, 10, seen, overwrite=overwrite)
    assert (await read_register(store)).register == register
    assert len(store.sent) == sent
    assert len(set(map(repr, store.sent))) == 1, "always the same condition"
    assert store.deleted == []


async def test_an_answer_may_be_late(start):
    store, seen, overwrite = await start(["late", "dropped", "dropped", "dropped", "dropped"])
    await send(store, 10, seen, overwrite=overwrite)
    await asyncio.sleep(0.05)
    assert await attempt_in(store) == id_(10)


async def test_unclear_forever(start):
    store, seen, overwrite = await start(Always(["dropped"]))
    began = time.monotonic()
    with pytest.raises(CommitStateUnknown) as unknown:
        await send(store, 10, seen, overwrite=overwrite)
    assert time.monotonic() - began < QUICK.deadline_s + 0.5
    assert len(store.sent) > 5
    assert id_(10) in str(unknown.value)
    assert store.deleted == []
    assert await store.get(manifest_key(id_(10)), limit=10_000), "nothing is deleted: it may have landed"


@pytest.mark.parametrize(
    "fault", [StoreUnavailable("get: reset"), PermissionDenied("get: denied"), Throttled("get: slow down")], ids=repr
)
async def test_not_even_a_refused_read_back_is_a_no(start, fault):
    store, seen, overwrite = await start(["lost"], Always([fault]))
    began = time.monotonic()
    with pytest.raises(CommitStateUnknown) as unknown:
        await send(store, 10, seen, overwrite=overwrite)
    assert time.monotonic() - began < QUICK.deadline_s + 0.5
    assert any(type(fault).__name__ in note for note in unknown.value.__notes__)
    assert store.deleted == []
    store.gets = []
    assert await attempt_in(store) == id_(10), "as here, where it had landed"


async def test_a_register_that_cannot_be_read_back_decides_nothing(start):
    async def spoil(store):
        await store.put(COMMIT_KEY, b"{")

    store, seen, overwrite = await start([(spoil, "dropped")])
    with pytest.raises(CommitStateUnknown):
        await send(store, 10, seen, overwrite=overwrite)
    assert store.deleted == []


@pytest.mark.parametrize("where", ["puts", "gets"])
async def test_a_store_that_hangs(start, monkeypatch, where):
    monkeypatch.setattr(commit, "_REGISTER_TIMEOUT_S", 0.05)
    hangs = Always(["hangs"])
    store, seen, overwrite = await start(hangs if where == "puts" else ["lost"], hangs if where == "gets" else [])
    began = time.monotonic()
    with pytest.raises(CommitStateUnknown):
        await send(store, 10, seen, overwrite=overwrite)
    assert time.monotonic() - began < QUICK.deadline_s + 0.5


async def test_a_clear_refusal_to_write_is_told_as_it_is(start):
    store, seen, overwrite = await start([PermissionDenied("put: denied")])
    before = await attempt_in(store)
    with pytest.raises(PermissionDenied):
        await send(store, 10, seen, overwrite=overwrite)
    assert await attempt_in(store) == before


async def test_but_not_after_an_answer_that_was_lost(start):
    store, seen, overwrite = await start(["late", PermissionDenied("put: the token expired")])
    with pytest.raises(CommitStateUnknown) as unknown:
        await send(store, 10, seen, overwrite=overwrite)
    assert "PermissionDenied" in "".join(unknown.value.__notes__)
    await asyncio.sleep(0.05)
    assert await attempt_in(store) == id_(10), "as here, where it landed after all"


@pytest.mark.parametrize("fault", [PermissionDenied("put: denied"), RequestRefused("put: 400")], ids=repr)
async def test_not_even_a_refusal_of_another_kind_is_believed_over_what_commit_says(start, fault):
    async def apply(store):
        register = Register("committed", id_(10), NO_ID, ManifestRef(manifest_key(id_(10)), 1, "0" * 64))
        await store.put(COMMIT_KEY, registers.encode(register))

    store, seen, overwrite = await start([(apply, fault)])
    await send(store, 10, seen, overwrite=overwrite)
    assert await attempt_in(store) == id_(10)


@pytest.mark.parametrize("where", ["put", "get"])
async def test_a_fault_of_a_library_decides_nothing(start, where):
    """It may stumble over the answer to what was applied; an error of no known kind would have the data deleted."""
    fault = KeyError("ETag")
    script = {"puts": [fault]} if where == "put" else {"puts": ["lost"], "gets": [fault]}
    store, seen, overwrite = await start(**script)
    with pytest.raises(CommitStateUnknown) as unknown:
        await send(store, 10, seen, overwrite=overwrite)
    assert unknown.value.__cause__ is fault
    assert store.deleted == []


@pytest.mark.parametrize("answer", [None, "dropped"], ids=["refused", "unclear"])
async def test_another_was_first(start, answer):
    async def another(store):
        seen = await read_register(store)
        await send(store, 7, seen, overwrite=True)

    store, seen, overwrite = await start([(another, answer)])
    with pytest.raises(StaleWrite if overwrite else CheckpointExists) as lost:
        await send(store, 10, seen, overwrite=overwrite)
    assert lost.value.url == store.url
    assert await attempt_in(store) == id_(7)
    assert len(store.sent) == 1


@pytest.mark.parametrize("answer", [None, "dropped"], ids=["refused", "unclear"])
async def test_a_collector_was_first(start, answer):
    async def collect(store):
        now = await read_register(store)
        register = now.register or Register("aborted", id_(99))
        fenced = Register(register.state, register.attempt, id_(11), register.manifest)
        await store.put(COMMIT_KEY, registers.encode(fenced))

    store, seen, overwrite = await start([(collect, answer)])
    with pytest.raises(AttemptAborted):
        await send(store, 10, seen, overwrite=overwrite)
    assert await attempt_in(store) != id_(10)


async def test_a_save_keeps_the_fence_that_was_raised_meanwhile(start):
    """Lowered again, it would let in saves whose data is collected."""

    async def collect(store):
        await move_register(store, raised, QUICK)

    store, seen, overwrite = await start([(collect, None)])
    await send(store, 10, seen, overwrite=overwrite)
    register = (await read_register(store)).register
    assert (register.attempt, register.fence) == (id_(10), id_(8))


async def test_the_oldest_id_of_all_ranks_counts_for_the_fence():
    store = Faulty(open_store(parse_url(elsewhere()), StoreOptions()))
    await store.put(COMMIT_KEY, registers.encode(Register("aborted", id_(1), id_(9))))
    seen = await read_register(store)
    store.sent.clear()
    with pytest.raises(AttemptAborted):
        await send(store, 10, seen, overwrite=False, oldest=8)
    assert store.sent == []
    register = await send(store, 10, seen, overwrite=False, oldest=9)
    assert register.fence == id_(9), "a fence is never lowered"


def raised(seen):
    return fenced_off(seen, id_(8))


async def test_a_collector_that_meets_a_commit_keeps_it(start):
    """It read the register before the save replaced it."""

    async def another(store):
        await send(store, 10, await read_register(store), overwrite=True)

    store, _, _ = await start([(another, None)])
    seen = await move_register(store, raised, QUICK)
    assert seen.register.attempt == id_(10)
    assert seen.register == (await read_register(store)).register
    assert seen.register.state == "committed"
    assert seen.register.fence == id_(8)
    assert len(store.sent) == 2, "one in vain, and one that counts"


@pytest.mark.parametrize(("fault", "sent"), [("dropped", 2), ("lost", 1), ("echo", 1)])
async def test_a_collector_goes_on_only_when_the_fence_is_there(start, fault, sent):
    store, _, _ = await start([fault])
    seen = await move_register(store, raised, QUICK)
    assert seen.register == (await read_register(store)).register
    assert seen.register.fence == id_(8)
    assert len(store.sent) == sent


@pytest.mark.parametrize("fault", ["dropped", "late"])
async def test_a_collector_that_is_never_answered_may_delete_nothing(start, fault):
    store, seen, _ = await start(Always([fault]) if fault == "dropped" else [fault, *["dropped"] * 500])
    if fault == "dropped":
        with pytest.raises(StoreUnavailable, match="nothing was deleted"):
            await move_register(store, raised, QUICK)
        assert (await read_register(store)).register == seen.register
    else:
        assert (await move_register(store, raised, QUICK)).register.fence == id_(8)


@pytest.mark.parametrize("place", ["memory", "local"])
@pytest.mark.parametrize("overwrite", [False, True], ids=["create", "replace"])
async def test_two_publishers_race(place, overwrite, tmp_path):
    for number in range(50):
        url = elsewhere() if place == "memory" else tmp_path / f"step-{number}"
        store = open_store(parse_url(url), StoreOptions())
        seen = NOTHING
        if overwrite:
            await send(store, 5, NOTHING, overwrite=False)
            seen = await read_register(store)
        # Every other time the first one's answer is lost, every third time the second one's.
        stores = [Faulty(store, ["lost"] * (number % 2 == 0)), Faulty(store, ["lost"] * (number % 3 == 0))]

        results = await asyncio.gather(
            *(send(s, 10 + i, seen, overwrite=overwrite) for i, s in enumerate(stores)), return_exceptions=True
        )

        winners = [i for i, result in enumerate(results) if isinstance(result, Register)]
        assert len(winners) == 1, results
        assert await attempt_in(store) == id_(10 + winners[0])
        (loser,) = (result for result in results if not isinstance(result, Register))
        assert type(loser) is (StaleWrite if overwrite else CheckpointExists)
        register, data = await open_manifest(store)
        assert manifests.decode(data, register.manifest, store.url).attempt == id_(10 + winners[0])


COMMITTED = Register("committed", id_(5), NO_ID, ManifestRef(manifest_key(id_(5)), 1, "0" * 64))


@pytest.fixture
def store():
    return open_store(parse_url(elsewhere()), StoreOptions())


@pytest.mark.parametrize("register", [None, Register("aborted", id_(1), id_(2)), Register("deleted", id_(1), id_(2))])
@pytest.mark.parametrize("overwrite", [True, False])
async def test_admitted(store, register, overwrite):
    if register:
        await store.put(COMMIT_KEY, registers.encode(register))
    seen = await admit(store, overwrite=overwrite, options=QUICK)
    assert seen.register == register
    assert (seen.version is None) == (register is None)


async def test_what_is_committed_is_replaced_only_on_request(store):
    await store.put(COMMIT_KEY, registers.encode(COMMITTED))
    with pytest.raises(CheckpointExists):
        await admit(store, overwrite=False, options=QUICK)
    assert (await admit(store, overwrite=True, options=QUICK)).register == COMMITTED


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", CorruptCommit),
        (b"garbage", CorruptCommit),
        (b" " * (registers.MAX_BYTES + 1), CorruptCommit),
        (b'{"format": "ckpt-cloud", "version": 7}', Unsupported),
    ],
    ids=["empty", "garbage", "oversize", "newer"],
)
async def test_a_register_that_cannot_be_understood(store, data, error):
    await store.put(COMMIT_KEY, data)
    for request in (read_register, open_manifest, lambda s: admit(s, overwrite=True, options=QUICK)):
        with pytest.raises(error) as refused:
            await request(store)
        assert refused.value.url == f"{store.url}/COMMIT"


class Careless(Faulty):
    async def capabilities(self):
        return Capabilities(conditional_create=True, conditional_replace=False)


async def test_a_store_without_conditions(store):
    with pytest.raises(Unsupported, match="ignores conditional writes"):
        await admit(Careless(store), overwrite=True, options=QUICK)
    unsafe = CommitOptions(allow_unsafe_commit=True)
    assert await admit(Careless(store), overwrite=True, options=unsafe) == NOTHING


async def test_nothing_to_open(store):
    with pytest.raises(CheckpointNotFound) as missing:
        await open_manifest(store)
    assert type(missing.value) is CheckpointNotFound
    assert "latest" in missing.value.hint


async def test_data_without_a_commit(store):
    await store.put(f"data/{id_(5)}/0.safetensors", b"x")
    with pytest.raises(CheckpointIncomplete):
        await open_manifest(store)


async def test_ranks_on_their_own(store):
    await store.put("rank-00000/COMMIT", b"{}")
    with pytest.raises(CheckpointPerRank):
        await open_manifest(store)


@pytest.mark.parametrize("state", ["aborted", "deleted"])
async def test_no_longer_there(store, state):
    await store.put(COMMIT_KEY, registers.encode(Register(state, id_(5), id_(6))))
    with pytest.raises(CheckpointDeleted, match=state):
        await open_manifest(store)


async def test_a_manifest_that_is_gone(store):
    await store.put(COMMIT_KEY, registers.encode(COMMITTED))
    with pytest.raises(CorruptManifest) as missing:
        await open_manifest(store)
    assert missing.value.url == f"{store.url}/{manifest_key(id_(5))}"
