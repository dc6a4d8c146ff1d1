"""Writers and a collector against one register, in every order, with every answer lost in every way.

A put may be answered, applied and not answered, applied and then answered by a refusal (a retry below us met our own
success), dropped, or still be under way and land at any later moment. The collector raises the fence whenever it likes.
All states that can be reached are visited.
"""

from dataclasses import dataclass, replace

import pytest
from msgspec import structs

from ckpt_cloud.errors import AttemptAborted, CheckpointExists, StaleWrite
from ckpt_cloud.format.layout import NO_ID
from ckpt_cloud.format.register import ManifestRef, Register
from ckpt_cloud.protocol import (
    Answer,
    Committed,
    Failed,
    Intent,
    Put,
    Seen,
    admit,
    after_put,
    after_read_back,
    base_of,
    first_step,
)

URL = "s3://bucket/run"
MAX_PUTS = 3


def id_(number):
    return f"{number:032x}"


@dataclass(frozen=True)
class Writer:
    """One save; `at` is what it does next."""

    number: int
    overwrite: bool
    at: str = "look"  # look, put, read back, over
    seen: Seen | None = None
    sent: Put | None = None
    puts: int = 0
    outcome: object = None  # Committed, an error's type, or "unknown" when it ran out of time

    def intent(self):
        reference = ManifestRef(f"data/{id_(self.number)}/manifest", 1, "0" * 64)
        register = Register("committed", id_(self.number), NO_ID, reference)
        return Intent(register, id_(self.number), self.overwrite, base_of(self.seen.register))

    def then(self, step):
        if isinstance(step, Committed):
            return replace(self, at="over", outcome=Committed)
        if isinstance(step, Failed):
            return replace(self, at="over", outcome=type(step.error))
        assert isinstance(step, Put)
        if self.puts == MAX_PUTS:
            return replace(self, at="over", outcome="unknown")
        return replace(self, at="put", sent=step)


@dataclass(frozen=True)
class World:
    register: Register | None
    version: int
    writers: tuple
    under_way: frozenset = frozenset()  # (writer's index, put)
    fence_raises: int = 0
    applied: tuple = ()  # numbers of the writers whose put was applied, in order

    def seen(self):
        return Seen(None) if self.register is None else Seen(self.register, f"v{self.version}")

    def with_writer(self, index, writer):
        return replace(self, writers=(*self.writers[:index], writer, *self.writers[index + 1 :]))

    def holds(self, put):
        return put.replaces == self.seen().version

    def put(self, index, put):
        """The register after a conditional put whose condition holds."""
        writer = self.writers[index]
        register = structs.replace(writer.intent().register, fence=put.fence)
        if self.register is not None:
            assert id_(writer.number) >= self.register.fence, "a save from below the fence was published"
            assert register.fence >= self.register.fence, "the fence was lowered"
            assert writer.overwrite or self.register.state != "committed", "replaced without overwrite"
        assert writer.number not in self.applied, "one put was applied twice"
        return replace(self, register=register, version=self.version + 1, applied=(*self.applied, writer.number))


def successors(world):
    for index, writer in enumerate(world.writers):
        yield from moves(world, index, writer)
    for landing in world.under_way:
        index, put = landing
        landed = replace(world, under_way=world.under_way - {landing})
        yield landed  # refused on arrival, or lost
        if world.holds(put):
            yield landed.put(index, put)
    if world.fence_raises:
        yield from collections(world)


def moves(world, index, writer):
    if writer.at == "look":
        seen = world.seen()
        looked = replace(writer, seen=seen)
        refusal = admit(seen, overwrite=writer.overwrite, url=URL)
        step = Failed(refusal) if refusal else first_step(looked.intent(), seen, URL)
        yield world.with_writer(index, looked.then(step))
    elif writer.at == "put":
        tried = replace(writer, puts=writer.puts + 1)
        if world.holds(writer.sent):
            applied = world.put(index, writer.sent)
            for answer in Answer:
                yield applied.with_writer(index, answered(tried, answer))
        else:
            yield world.with_writer(index, answered(tried, Answer.REFUSED))
        waiting = world.under_way | {(index, writer.sent)}
        yield replace(world, under_way=waiting).with_writer(index, answered(tried, Answer.UNCLEAR))
    elif writer.at == "read back":
        step = after_read_back(writer.intent(), writer.sent, world.seen(), URL)
        yield world.with_writer(index, writer.then(step))


def answered(writer, answer):
    step = after_put(answer)
    return writer.then(step) if isinstance(step, Committed) else replace(writer, at="read back")


def collections(world):
    """The collector raises the fence over some writers, or all, by a conditional write of its own."""
    for writer in world.writers:
        fence = id_(writer.number + 1)
        now = world.register
        if now is not None and now.fence >= fence:
            continue
        if now is None:
            raised = Register("aborted", id_(99), fence)
        else:
            raised = Register(now.state, now.attempt, fence, now.manifest)
        yield replace(world, register=raised, version=world.version + 1, fence_raises=world.fence_raises - 1)


def reachable(start):
    seen, rest = {start}, [start]
    while rest:
        world = rest.pop()
        yield world
        fresh = set(successors(world)) - seen
        seen |= fresh
        rest.extend(fresh)


def check_end(world):
    """What must hold once everybody is done and nothing is under way."""
    final = world.register
    for writer in world.writers:
        outcome = writer.outcome
        if outcome is Committed:
            assert writer.number in world.applied, "told that it won, and it never did"
        if outcome not in (Committed, "unknown"):
            visible = final is not None and final.state == "committed" and final.attempt == id_(writer.number)
            assert not visible, "told that it lost, and it is what a reader finds"
        if outcome is AttemptAborted:
            assert final.fence > id_(writer.number), "told that it was collected, and no fence is above it"
    if not any(writer.overwrite for writer in world.writers):
        assert len(world.applied) <= 1, "two creates won"
        winners = [writer for writer in world.writers if writer.outcome is Committed]
        assert len(winners) <= 1
        losers = [writer for writer in world.writers if writer.outcome not in (Committed, "unknown")]
        assert not {writer.number for writer in losers} & set(world.applied), "a winner was told that it lost"


def visit(start):
    """Checks every end that can be reached, and returns the outcomes that writers met."""
    outcomes = set()
    for world in reachable(start):
        if all(writer.at == "over" for writer in world.writers) and not world.under_way:
            outcomes |= {writer.outcome for writer in world.writers}
            check_end(world)
    return outcomes


REGISTERS = {
    "nothing": None,
    "committed": Register("committed", id_(1), NO_ID, ManifestRef(f"data/{id_(1)}/manifest", 1, "0" * 64)),
    "deleted": Register("deleted", id_(1), id_(2)),
}


@pytest.mark.parametrize("before", REGISTERS)
@pytest.mark.parametrize("fence_raises", [0, 1, 2])
@pytest.mark.parametrize("overwrite", [(False, False), (False, True), (True, True)], ids=["create", "mixed", "replace"])
def test_every_order_of_two_writers(before, fence_raises, overwrite):
    writers = (Writer(10, overwrite[0]), Writer(20, overwrite[1]))
    outcomes = visit(World(REGISTERS[before], 0, writers, fence_raises=fence_raises))
    # The simulation reaches what it is about.
    if any(overwrite) or before != "committed":
        assert {Committed, "unknown"} <= outcomes
        assert AttemptAborted in outcomes or not fence_raises


def test_every_order_of_three_writers(monkeypatch):
    monkeypatch.setitem(globals(), "MAX_PUTS", 2)
    writers = (Writer(10, overwrite=True), Writer(20, overwrite=True), Writer(30, overwrite=False))
    assert {Committed, "unknown", StaleWrite, CheckpointExists} <= visit(World(None, 0, writers))


def test_a_protocol_that_trusts_refusals_would_be_caught(monkeypatch):
    """The check can fail: a writer that takes every refusal for a defeat, as without the read-back."""
    monkeypatch.setitem(globals(), "answered", trusting)
    start = World(None, 0, (Writer(10, overwrite=False), Writer(20, overwrite=False)))
    with pytest.raises(AssertionError, match="told that it lost"):
        visit(start)


def trusting(writer, answer):
    if answer is Answer.REFUSED:
        return replace(writer, at="over", outcome=FileExistsError)
    step = after_put(answer)
    return writer.then(step) if isinstance(step, Committed) else replace(writer, at="read back")
