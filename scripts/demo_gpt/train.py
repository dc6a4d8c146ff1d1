"""One rank of the training job; `python -m demo_gpt.train --help`, started by torchrun.

What happens is told on standard output, one JSON object a line, for `demo_gpt.job` to read.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import ckpt_cloud
from ckpt_cloud.events import Event
from demo_gpt.data import Place, batch, standard_library
from demo_gpt.digest import digests
from demo_gpt.model import CONTEXT, VOCABULARY, sharded_gpt
from demo_gpt.steps import step_name

SEED = 7
GLOBAL_ROWS = 16
LEARNING_RATE = 1e-3
WARMUP_STEPS = 8


def tell(kind: str, **fields: Any) -> None:
    # One write of less than a pipe's atomic 4096 bytes: lines of several ranks never mix.
    os.write(1, (json.dumps({"kind": kind, "rank": dist.get_rank(), **fields}) + "\n").encode())


class Trainer:
    """The model, its optimizer and the step that comes next, on this rank."""

    def __init__(self) -> None:
        torch.manual_seed(SEED)
        self.place = Place(dist.get_rank(), dist.get_world_size())
        self.model = sharded_gpt()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE)
        self.corpus = standard_library()
        self.step = 0

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs; the tensors are the live ones."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "position": self.position(), "rng": torch.get_rng_state()}

    def position(self) -> dict[str, int]:
        return {"step": self.step, "seed": SEED, "corpus_bytes": len(self.corpus)}

    def restore(self, state: dict[str, Any]) -> None:
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        torch.set_rng_state(state["rng"])
        self.step = state["position"]["step"]
        if state["position"] != self.position():
            raise SystemExit(f"the checkpoint was trained on other data: {state['position']}")

    def train_step(self) -> float:
        """One step of AdamW; returns the loss over the global batch."""
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (self.step + 1) / WARMUP_STEPS)
        text, target = batch(
            self.corpus, seed=SEED, step=self.step, total_rows=GLOBAL_ROWS, length=CONTEXT, place=self.place
        )
        loss = nn.functional.cross_entropy(self.model(text).view(-1, VOCABULARY), target.reshape(-1))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        mean = loss.detach() / self.place.world_size
        dist.all_reduce(mean)
        return mean.item()


@dataclasses.dataclass(slots=True)
class Flight:
    """A save that runs beside the training."""

    step: int
    writer: ckpt_cloud.ObjectStoreWriter
    future: Future[Any]

    def land(self) -> None:
        """Wait until the checkpoint is committed, or raise what went wrong."""
        self.future.result()
        report = self.writer.report
        tell("saved", step=self.step, bytes=report.bytes_written, seconds=report.seconds)


class Saver:
    """Saves to `<root>/step-N` in the background, one at a time."""

    def __init__(self, root: str, notes: Path) -> None:
        self.root = root
        self.notes = notes
        # The background thread runs collectives of its own, which must not meet those of the training.
        self.group = dist.new_group(backend="gloo")
        self.flight: Flight | None = None

    def save(self, trainer: Trainer) -> float:
        """Start to save; returns the seconds for which that kept the training waiting."""
        state = trainer.state()
        write_digests(self.notes / f"saved-{trainer.step}.json", state)
        began = time.perf_counter()
        self.land()
        url = f"{self.root}/{step_name(trainer.step)}"
        writer = ckpt_cloud.ObjectStoreWriter(url, on_event=_tell_when_uploaded(trainer.step))
        future = ckpt_cloud.async_save(
            trainer.state(), checkpoint_id=url, storage_writer=writer, process_group=self.group
        )
        assert isinstance(future, Future), "without a stager there is nothing to wait for but the upload"
        self.flight = Flight(trainer.step, writer, future)
        return time.perf_counter() - began

    def poll(self) -> None:
        if self.flight and self.flight.future.done():
            self.land()

    def land(self) -> None:
        if self.flight:
            self.flight.land()
        self.flight = None


def _tell_when_uploaded(step: int) -> Callable[[Event], None]:
    """For whoever wants to kill in the middle: this rank's data is stored, and nothing is committed yet."""

    def listener(event: Event) -> None:
        if isinstance(event, ckpt_cloud.PhaseEnded) and event.name == "write":
            tell("uploaded", step=step)

    return listener


def write_digests(path: Path, state: dict[str, Any]) -> None:
    """The demo's own proof, kept apart from the checkpoint. A collective; rank 0 writes."""
    found = digests(state)
    if dist.get_rank() == 0:
        path.write_text(json.dumps(found, indent=1))


def resume(trainer: Trainer, url: str, notes: Path) -> None:
    began = time.perf_counter()
    state = trainer.state()
    ckpt_cloud.load(state, checkpoint_id=url)
    trainer.restore(state)
    seconds = time.perf_counter() - began
    # Not of what was loaded but of what the model and the optimizer now hold.
    write_digests(notes / f"restored-{trainer.step}.json", trainer.state())
    tell("restored", step=trainer.step, seconds=seconds)


def train(trainer: Trainer, saver: Saver | None, *, steps: int, save_every: int) -> None:
    while trainer.step < steps:
        loss = trainer.train_step()
        blocked = None
        if saver and trainer.step % save_every == 0:
            blocked = saver.save(trainer)
        if dist.get_rank() == 0:
            tell("step", step=trainer.step, loss=loss, blocked=blocked)
        if not math.isfinite(loss):
            raise SystemExit(f"the loss is {loss} at step {trainer.step}")
        if saver:
            saver.poll()
    if saver:
        saver.land()


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--root", help="save to <root>/step-N; without it nothing is saved")
    parser.add_argument("--save-every", type=int, default=0)
    parser.add_argument("--resume", help="URL of the checkpoint to begin from")
    parser.add_argument("--notes", type=Path, required=True, help="folder for the digests")
    args = parser.parse_args()
    with process_group():
        tell("started", pid=os.getpid())
        trainer = Trainer()
        if args.resume:
            resume(trainer, args.resume, args.notes)
        saver = Saver(args.root, args.notes) if args.root else None
        train(trainer, saver, steps=args.steps, save_every=args.save_every)
    # Skips the interpreter's end, where a gloo thread that still holds a tensor aborts (pytorch/pytorch#179291).
    os._exit(0)


if __name__ == "__main__":
    main()
