"""The commit protocol as a model small enough to be checked whole: run me, or read me in one sitting.

Two writers, a collector, a deleter and a reader share one checkpoint URL. Every order of their steps is tried, and for
every write every fate: answered; carried out and its answer lost; lost; still under way, to land at any later moment.
Whoever stops anywhere has crashed, so crashes need no step of their own: the checks below hold in *every* state.

The decisions are not modelled, they are the shipped ones: `ckpt_cloud.protocol`. What is modelled is the world around
them: the register (its version is its content, as an ETag is), the objects, and who has read what.

There is no grace age and there are no clocks here: the collector takes any fence, as if its clock were arbitrarily
wrong. So the grace age is for politeness to running saves and loads, not for safety.

    python docs/model/commit_model.py

docs/commit.md says what the numbers were.
"""

# ruff: noqa: T201, INP001 - a script that prints what it found

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

from msgspec import structs

from ckpt_cloud import protocol
from ckpt_cloud.errors import AttemptAborted
from ckpt_cloud.format.layout import NO_ID
from ckpt_cloud.format.register import ManifestRef, Register
from ckpt_cloud.protocol import Answer, Committed, Failed, Intent, Put, Seen

URL = "s3://bucket/run"


def id_(number: int) -> str:
    """An id; its order is its time."""
    return f"{number:032x}"


OLD = id_(1)
"""Of the checkpoint that may be there before."""
FIRST, SECOND = (id_(2), id_(4)), (id_(3), id_(5))
"""Ids of each writer's two ranks, under which their objects lie; the second is the coordinator's. They interleave."""
OBJECTS = {OLD: {OLD}, FIRST[1]: set(FIRST), SECOND[1]: set(SECOND)}
"""What each attempt needs."""


class Writer(NamedTuple):
    """One save; `at` is its next step: look, store, put, read back, over."""

    ids: tuple[str, str]
    overwrite: bool
    at: str = "look"
    seen: Seen | None = None
    sent: Put | None = None
    puts_left: int = 2
    outcome: object = None
    """Committed, the type of an error, or None: under way, or ended without knowing."""


class Cleaner(NamedTuple):
    """The collector or the deleter; `at` is its next step: list, read, put, over."""

    deletes: bool
    """Whether it deletes the checkpoint itself, rather than collect."""
    at: str = "list"
    listed: frozenset[str] = frozenset()
    fence: str = NO_ID
    seen: Seen | None = None
    puts_left: int = 1


class Reader(NamedTuple):
    """One load; `at` is its next step: look, read, over."""

    at: str = "look"
    attempt: str = ""
    left: frozenset[str] = frozenset()


class Sent(NamedTuple):
    """A conditional write that may land at any later moment."""

    replaces: str | None
    register: Register
    writer: int | None


class World(NamedTuple):
    """One state of everything."""

    register: Register | None
    stored: frozenset[str]
    doomed: frozenset[str]
    """Objects whose deletion was sent; each may happen at any later moment, or never."""
    under_way: frozenset[Sent]
    writers: tuple[Writer, ...]
    cleaners: tuple[Cleaner, ...]
    reader: Reader
    published: frozenset[int] = frozenset()
    """Writers whose register was applied."""


class Rules(NamedTuple):
    """What the writers and cleaners go by; the weakened ones show that the checks can fail."""

    oldest: Callable[[tuple[str, str]], str] = min
    """Of a save's ids, the one that its fence is held against."""
    fenced_off: Callable[[Seen, str], Register | None] = protocol.fenced_off
    deleted: Callable[[Seen, str], Register | None] = protocol.deleted
    conditional: bool = True
    """Whether the store keeps the conditions of writes."""


class Broken(AssertionError):
    """A state in which something does not hold that must."""


def seen_of(register: Register | None) -> Seen:
    """What a read of the register gives. Its version is its content, so that writing the same again changes nothing."""
    return Seen(None) if register is None else Seen(register, f"{register.state} {register.attempt} {register.fence}")


def intent_of(writer: Writer, rules: Rules) -> Intent:
    """As `ckpt_cloud.commit.publish` makes it."""
    attempt = writer.ids[1]
    register = Register("committed", attempt, NO_ID, ManifestRef(f"data/{attempt}/manifest", 1, "0" * 64))
    base = protocol.base_of(writer.seen.register) if writer.seen else ""
    return Intent(register, rules.oldest(writer.ids), writer.overwrite, base)


def needed(register: Register | None) -> set[str]:
    """Objects of the checkpoint that the register makes visible."""
    return OBJECTS[register.attempt] if register is not None and register.state == "committed" else set()


# Steps: each gives the worlds that may come next, with words for a trace.


def steps(world: World, rules: Rules) -> Iterator[tuple[str, World]]:
    """All that may happen next."""
    for number, writer in enumerate(world.writers):
        for said, after in _writer_steps(world, number, writer, rules):
            yield f"writer {number} {said}", after
    for number, cleaner in enumerate(world.cleaners):
        name = "deleter" if cleaner.deletes else "collector"
        for said, after in _cleaner_steps(world, number, cleaner, rules):
            yield f"{name} {said}", after
    yield from _reader_steps(world)
    for sent in world.under_way:
        landed = world._replace(under_way=world.under_way - {sent})
        yield "a write that was under way arrives", _applied(landed, sent, rules) or landed
    for key in world.doomed & world.stored:
        yield f"object {key[-1]} is deleted", world._replace(stored=world.stored - {key}, doomed=world.doomed - {key})


def _applied(world: World, sent: Sent, rules: Rules) -> World | None:
    """The world after a conditional write; None if its condition does not hold."""
    if rules.conditional and seen_of(world.register).version != sent.replaces:
        return None
    published = world.published if sent.writer is None else world.published | {sent.writer}
    return world._replace(register=sent.register, published=published)


def _fates(world: World, sent: Sent, rules: Rules) -> Iterator[tuple[Answer, World]]:
    """What may become of a conditional write, and what its sender is told."""
    after = _applied(world, sent, rules)
    if after is None:
        yield Answer.REFUSED, world
    else:
        yield Answer.APPLIED, after
        yield Answer.UNCLEAR, after
        # Something below us sent it again, and met our own success.
        yield Answer.REFUSED, after
    yield Answer.UNCLEAR, world._replace(under_way=world.under_way | {sent})


def _writer_steps(world: World, number: int, writer: Writer, rules: Rules) -> Iterator[tuple[str, World]]:
    def becomes(after: World, now: Writer) -> World:
        writers = (*after.writers[:number], now, *after.writers[number + 1 :])
        return after._replace(writers=writers)

    def then(step: protocol.Step) -> Writer:
        if isinstance(step, Put):
            return writer._replace(at="put", sent=step) if writer.puts_left else writer._replace(at="over")
        outcome = type(step.error) if isinstance(step, Failed) else type(step)
        return writer._replace(at="over", outcome=outcome)

    if writer.at == "look":
        seen = seen_of(world.register)
        refusal = protocol.admit(seen, overwrite=writer.overwrite, url=URL)
        refused = writer._replace(at="over", outcome=type(refusal))
        yield "looks", becomes(world, refused if refusal else writer._replace(at="store", seen=seen))
    elif writer.at == "store":
        assert writer.seen is not None
        stored = world._replace(stored=world.stored | set(writer.ids))
        step = protocol.first_step(intent_of(writer, rules), writer.seen, URL)
        yield "stores", becomes(stored, then(step))
    elif writer.at == "put":
        assert writer.sent is not None
        register = structs.replace(intent_of(writer, rules).register, fence=writer.sent.fence)
        tried = writer._replace(puts_left=writer.puts_left - 1)
        for answer, after in _fates(world, Sent(writer.sent.replaces, register, number), rules):
            over = isinstance(protocol.after_put(answer), Committed)
            now = tried._replace(at="over", outcome=Committed) if over else tried._replace(at="read back")
            yield f"puts COMMIT: {answer.name}", becomes(after, now)
    elif writer.at == "read back":
        assert writer.sent is not None
        next_step = protocol.after_read_back(intent_of(writer, rules), writer.sent, seen_of(world.register), URL)
        yield "reads back", becomes(world, then(next_step))


def _cleaner_steps(world: World, number: int, cleaner: Cleaner, rules: Rules) -> Iterator[tuple[str, World]]:
    def becomes(after: World, now: Cleaner) -> World:
        return after._replace(cleaners=(*after.cleaners[:number], now, *after.cleaners[number + 1 :]))

    def cleaned(after: World, register: Register | None) -> World:
        """It has won the register: whatever is below its fence and not needed may go."""
        doomed = {key for key in cleaner.listed if key < cleaner.fence and key not in needed(register)}
        return becomes(after._replace(doomed=after.doomed | doomed), Cleaner(cleaner.deletes, at="over"))

    if cleaner.at == "list" and world.stored:
        above = id_(max(int(key, 16) for key in world.stored) + 1)
        fences = [above] if cleaner.deletes else [id_(n) for n in range(2, int(above, 16) + 1)]
        for fence in fences:
            listed = cleaner._replace(at="read", listed=world.stored, fence=fence)
            yield f"lists, with fence {fence[-1]}", becomes(world, listed)
    elif cleaner.at == "read":
        seen = seen_of(world.register)
        wanted = (rules.deleted if cleaner.deletes else rules.fenced_off)(seen, cleaner.fence)
        if wanted is None:
            yield "reads that all is fenced off", cleaned(world, world.register)
        elif cleaner.puts_left:
            yield "reads", becomes(world, cleaner._replace(at="put", seen=seen))
        else:
            yield "gives up", becomes(world, cleaner._replace(at="over"))
    elif cleaner.at == "put":
        assert cleaner.seen is not None
        wanted = (rules.deleted if cleaner.deletes else rules.fenced_off)(cleaner.seen, cleaner.fence)
        assert wanted is not None
        for answer, after in _fates(world, Sent(cleaner.seen.version, wanted, None), rules):
            if answer is Answer.APPLIED:
                yield "raises the fence", cleaned(after, wanted)
            else:
                retry = cleaner._replace(at="read", puts_left=cleaner.puts_left - 1)
                yield f"raises the fence: {answer.name}", becomes(after, retry)


def _reader_steps(world: World) -> Iterator[tuple[str, World]]:
    reader = world.reader
    if reader.at == "look":
        attempt = protocol.base_of(world.register)
        now = Reader("read", attempt, frozenset(OBJECTS[attempt])) if attempt else Reader("over")
        yield "reader opens", world._replace(reader=now)
    elif reader.at == "read":
        key = min(reader.left)
        if key not in world.stored and protocol.base_of(world.register) == reader.attempt:
            raise Broken("a load misses an object of a checkpoint that is visible")
        left = reader.left - {key} if key in world.stored else frozenset()
        now = Reader("read", reader.attempt, left) if left else Reader("over")
        yield f"reader reads {key[-1]}", world._replace(reader=now)


def check(world: World) -> None:
    """What must hold in every state.

    Raises:
        Broken: it does not.
    """
    missing = needed(world.register) - world.stored
    if missing:
        raise Broken("a visible checkpoint lacks its data")
    for number, writer in enumerate(world.writers):
        published = number in world.published
        if writer.outcome is Committed and not published:
            raise Broken("a writer was told that it won, and it never did")
        if writer.outcome not in (None, Committed) and protocol.base_of(world.register) == writer.ids[1]:
            raise Broken("a writer was told that it lost, and its checkpoint is visible")
        if writer.outcome is AttemptAborted and (world.register is None or world.register.fence <= min(writer.ids)):
            raise Broken("a writer was told that it was collected, and no fence is above it")
    creators = [number for number, writer in enumerate(world.writers) if not writer.overwrite]
    if len(creators) == len(world.writers) and len(world.published) > 1 and not _deleting(world):
        raise Broken("two saves without overwrite won")


def _deleting(world: World) -> bool:
    return any(cleaner.deletes for cleaner in world.cleaners)


def is_clean_after_gc(world: World) -> bool:
    """Whether one more collection, with nothing else going on, would leave what is visible and nothing else."""
    above = id_(99)
    raised = protocol.fenced_off(seen_of(world.register), above) or world.register
    left = {key for key in world.stored if key in needed(raised)}
    return left == needed(world.register) and needed(raised) == needed(world.register)


class Found(NamedTuple):
    """Of an exhaustive search."""

    states: int
    outcomes: frozenset[object]
    """Of the writers, in states where nothing can happen any more."""


def explore(start: World, rules: Rules = Rules()) -> Found:  # noqa: B008 - immutable
    """Visits every state that can be reached, nearest first.

    Raises:
        Broken: with the shortest way to the state that is wrong, as notes.
    """
    came_from: dict[World, tuple[str, World | None]] = {start: ("begin", None)}
    rest, outcomes = deque([start]), set[object]()
    while rest:
        world = rest.popleft()
        try:
            check(world)
            nexts = list(steps(world, rules))
        except Broken as broken:
            broken.add_note(f"after {len(came_from)} states: " + "; ".join(_way(world, came_from)))
            raise
        if not nexts:
            outcomes |= {writer.outcome for writer in world.writers}
            if not is_clean_after_gc(world):
                raise Broken("something is left that no collection would find")
        for said, after in nexts:
            if after not in came_from:
                came_from[after] = (said, world)
                rest.append(after)
    return Found(len(came_from), frozenset(outcomes))


def _way(world: World, came_from: dict[World, tuple[str, World | None]]) -> list[str]:
    way: list[str] = []
    at: World | None = world
    while at is not None:
        said, at = came_from[at]
        way.append(said)
    return way[::-1]


BEFORE: dict[str, Register | None] = {
    "nothing": None,
    "committed": Register("committed", OLD, NO_ID, ManifestRef(f"data/{OLD}/manifest", 1, "0" * 64)),
    "deleted": Register("deleted", OLD, id_(2)),
}


def _not_raising(seen: Seen, fence: str) -> Register | None:
    marked = protocol.deleted(seen, fence)
    if marked is None or seen.register is None or seen.register.state != "committed":
        return None
    return structs.replace(marked, fence=seen.register.fence)


WEAKENED = {
    "a collector that does not win the register first": Rules(fenced_off=lambda _seen, _fence: None),
    "a collector on a store that ignores conditions": Rules(conditional=False),
    "a writer that does not look at the fence": Rules(oldest=lambda _ids: "f" * 32),
    "a writer that holds the fence against its own id, not its oldest rank's": Rules(oldest=max),
    "a deleter that does not raise the fence": Rules(deleted=_not_raising),
}


class Case(NamedTuple):
    """One beginning to explore."""

    before: str
    overwrite: tuple[bool, bool]
    cleaner: str


CASES = [
    Case(before, overwrite, cleaner)
    for before in BEFORE
    for overwrite in ((False, False), (False, True), (True, True))
    for cleaner in ("collector", "deleter")
]


def beginning(case: Case) -> World:
    """The world of a case."""
    register = BEFORE[case.before]
    writers = (Writer(FIRST, case.overwrite[0]), Writer(SECOND, case.overwrite[1]))
    cleaners = (Cleaner(deletes=case.cleaner == "deleter"),)
    return World(register, frozenset(needed(register)), frozenset(), frozenset(), writers, cleaners, Reader())


def weakened(name: str) -> Found:
    """Explores with the rules of that name, where it shows what they are for."""
    cleaner = "deleter" if "deleter" in name else "collector"
    return explore(beginning(Case("committed", (True, True), cleaner)), WEAKENED[name])


def main() -> None:
    """Checks the protocol as shipped, then shows that each weakened one is caught."""
    total = 0
    for case in CASES:
        found = explore(beginning(case))
        total += found.states
        print(f"{found.states:>9,} states hold: {case}", flush=True)
    print(f"{total:>9,} states in all")
    for name in WEAKENED:
        try:
            weakened(name)
        except Broken as broken:
            print(f"caught: {name}: {broken}\n  {' '.join(broken.__notes__)}")
        else:
            raise SystemExit(f"not caught: {name}")


if __name__ == "__main__":
    main()
