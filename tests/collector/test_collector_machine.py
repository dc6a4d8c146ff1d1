"""Saves, overwrites, crashes, loads, deletes, collections, stalled writers and clock jumps, in any order.

The model is a plain dict of what each URL holds. Whatever happened, a load gives exactly that.
"""

import time
from datetime import timedelta
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

import ckpt_cloud
from ckpt_cloud import protocol
from ckpt_cloud.errors import AttemptAborted, CheckpointExists, CheckpointNotFound, CkptCloudError, StaleWrite
from ckpt_cloud.metadata import Uploaded
from ckpt_cloud.testing import Faults
from tests.collector.conftest import QUICK, Run, state

NAMES = st.sampled_from(["a", "b"])
real_time, real_time_ns = time.time, time.time_ns


class Stalled:
    """A save that has stored everything and not yet committed."""

    def __init__(self, run, name, value, *, overwrite):
        self.name, self.value = name, value
        self.register = run.register(name)
        self.writer = ckpt_cloud.ObjectStoreWriter(run.url(name), overwrite=overwrite, commit=QUICK)
        planner = DefaultSavePlanner()
        planner.set_up_planner(state(value), None, is_coordinator=True)
        self.writer.set_up_storage_writer(is_coordinator=True)
        plan = self.writer.prepare_local_plan(planner.create_local_plan())
        plans, self.metadata = planner.create_global_plan([plan])
        final = planner.finish_plan(self.writer.prepare_global_plan(plans)[0])
        self.results = [self.writer.write_data(final, planner).value()]
        (result,) = self.results[0]
        self.id = Uploaded.decode(result.storage_data).attempt

    def wake(self):
        self.writer.finish(self.metadata, self.results)


def failure_of(act):
    """The type of the error that it ends with, or None."""
    try:
        act()
    except CkptCloudError as error:
        return type(error)
    return None


class Machine(RuleBasedStateMachine):
    stalled = Bundle("stalled")

    @initialize()
    def begin(self):
        self.run = Run(f"memory://{id(self)}-{real_time_ns()}/run")
        self.model = {}
        self.offset_s = self.furthest_s = 0.0
        self.values = iter(range(1, 10_000))
        self.clock = mock.patch.multiple(
            "time",
            time=lambda: real_time() + self.offset_s,
            time_ns=lambda: real_time_ns() + int(self.offset_s * 1e9),
        )
        self.clock.start()

    def teardown(self):
        if not hasattr(self, "run"):
            return
        try:
            # By now whatever there was is old.
            self.offset_s = 400 * 86400.0
            collected = ckpt_cloud.gc(self.run.root, older_than=timedelta(0))
            assert collected.skipped == []
            self.holds()
            assert set(self.run.stored()) == self.run.needed(), "something is left"
        finally:
            self.clock.stop()

    @rule(name=NAMES, overwrite=st.booleans())
    def save(self, name, overwrite):
        value = next(self.values)
        try:
            self.run.save(name, value, overwrite=overwrite)
        except CheckpointExists:
            assert name in self.model
            assert not overwrite
        except AttemptAborted:
            assert self.behind()
        else:
            self.model[name] = value

    @rule(name=NAMES, at=st.integers(0, 12), lost=st.booleans(), gone=st.booleans())
    def crash_in_a_save(self, name, at, lost, gone):
        value = next(self.values)
        self.crash(lambda: self.run.save(name, value, overwrite=True), name, value, at=at, lost=lost, gone=gone)

    @rule(name=NAMES, at=st.integers(0, 8), lost=st.booleans(), gone=st.booleans())
    def crash_in_a_delete(self, name, at, lost, gone):
        self.crash(lambda: self.remove(name), name, None, at=at, lost=lost, gone=gone)

    @rule(at=st.integers(0, 20), lost=st.booleans(), hours=st.sampled_from([0, 24]))
    def crash_in_a_collection(self, at, lost, hours):
        def act():
            ckpt_cloud.gc(self.run.root, older_than=timedelta(hours=hours))

        self.crash(act, None, None, at=at, lost=lost, gone=True)

    def remove(self, name):
        try:
            ckpt_cloud.delete(self.run.url(name))
        except CheckpointNotFound:
            assert name not in self.model

    def crash(self, act, name, becomes, *, at, lost, gone):
        faults = Faults()
        if gone:
            faults.crash_at(at + 1)
        else:
            faults.fail("*", after=at, times=1, applied=lost)
        try:
            with faults.everywhere():
                act()
        except CkptCloudError:
            if name is not None:
                seen = self.run.load(name)
                assert seen in (becomes, self.model.get(name)) or self.absent(seen)
                if self.absent(seen):
                    assert becomes is None or name not in self.model
                    self.model.pop(name, None)
                else:
                    self.model[name] = seen
        else:
            if name is not None and becomes is None:
                self.model.pop(name, None)
            elif name is not None:
                self.model[name] = becomes

    @rule(name=NAMES)
    def delete(self, name):
        self.remove(name)
        self.model.pop(name, None)

    @rule(hours=st.sampled_from([0, 1, 24]))
    def collect(self, hours):
        assert ckpt_cloud.gc(self.run.root, older_than=timedelta(hours=hours)).skipped == []

    @rule(target=stalled, name=NAMES, overwrite=st.booleans())
    def stall(self, name, overwrite):
        try:
            return Stalled(self.run, name, next(self.values), overwrite=overwrite)
        except CheckpointExists:
            assert name in self.model
            return None
        except AttemptAborted:
            assert self.behind()
            return None

    @rule(writer=consumes(stalled))
    def wake(self, writer):
        if writer is None:
            return
        register = self.run.register(writer.name)
        told = failure_of(writer.wake)
        if told is not None:
            # Something happened here since it began, and what that was is what it is told.
            assert register != writer.register
            assert (told is AttemptAborted) == (register.fence > writer.id)
            assert told in (AttemptAborted, CheckpointExists, StaleWrite)
            return
        assert register is None or register.fence <= writer.id
        assert protocol.base_of(register) in ("", protocol.base_of(writer.register))
        self.model[writer.name] = writer.value

    def behind(self):
        """Whether this clock is behind one by which something was fenced off, perhaps."""
        return self.offset_s < self.furthest_s

    @rule(hours=st.sampled_from([-30.0, -1.0, 1.0, 30.0]))
    def jump(self, hours):
        self.offset_s += hours * 3600
        self.furthest_s = max(self.furthest_s, self.offset_s)

    @rule(name=NAMES)
    def resolve(self, name):
        try:
            settled = ckpt_cloud.resolve(self.run.url(name))
        except CheckpointNotFound:
            assert not [key for key in self.run.stored() if key.startswith(f"{name}/")]
            return
        assert (settled.state == "committed") == (name in self.model)

    @rule(name=NAMES)
    def load_a_part(self, name):
        part = {"w": torch.zeros(500)}
        try:
            ckpt_cloud.load(part, checkpoint_id=self.run.url(name))
        except CheckpointNotFound:
            assert name not in self.model
        else:
            assert part["w"].eq(self.model[name]).all()

    @invariant()
    def holds(self):
        for name in ("a", "b"):
            seen = self.run.load(name)
            assert self.absent(seen) if name not in self.model else seen == self.model[name]

    @staticmethod
    def absent(seen):
        return isinstance(seen, type) and issubclass(seen, CheckpointNotFound)


def machine(max_examples, *marks):
    class Case(Machine.TestCase):
        pass

    Case.settings = settings(
        stateful_step_count=25, max_examples=max_examples, deadline=None, suppress_health_check=list(HealthCheck)
    )
    ignored = "ignore:torch.distributed is disabled:UserWarning"
    Case.pytestmark = [*marks, pytest.mark.timeout(600), pytest.mark.filterwarnings(ignored)]
    return Case


TestMachine = machine(15)
TestMachineForLong = machine(60, pytest.mark.slow)
