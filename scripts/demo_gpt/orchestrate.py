"""A small GPT is trained on 4 ranks, killed in the middle of a save, and resumed on 2 with the same bits.

Starts an S3 server of its own (SeaweedFS) unless --url says where else to save.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ckpt_cloud import CkptCloudError, latest, list_checkpoints
from demo_gpt.job import Job, JobFailed
from demo_gpt.plot import draw
from demo_gpt.record import Record
from demo_gpt.report import Outcome, digests_equal, judge
from demo_gpt.screen import Screen
from demo_gpt.steps import step_name, step_of

RANKS = 4
RANKS_RESUMED = 2
KILLS_MAX = 3


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run and where: `root` holds the checkpoints, `out` what the demo leaves behind."""

    root: str
    out: Path
    steps: int
    save_every: int

    @property
    def log(self) -> Path:
        return self.out / "train.log"

    @property
    def kill_from(self) -> int:
        """The first save that is interrupted: about half way."""
        return max(2, self.steps // 2 // self.save_every) * self.save_every

    def arguments(self, *, save: bool = True, resume: str | None = None) -> list[str]:
        found = ["--steps", str(self.steps), "--notes", str(self.out / "digests")]
        if save:
            found += ["--root", self.root, "--save-every", str(self.save_every)]
        return found + (["--resume", resume] if resume else [])


def train_until_killed(plan: Plan, screen: Screen) -> tuple[Record, int]:
    """Train, and kill the job while a save is under way; returns at which step."""
    record = Record(RANKS)
    kill_from = plan.kill_from
    for _ in range(KILLS_MAX):
        killed_at = _run_and_kill(plan, screen, record, kill_from)
        if _state(plan, killed_at) != "committed":
            return record, killed_at
        screen.say(f"[yellow]the save of step {killed_at} was quicker than the kill; once more[/]")
        kill_from = killed_at + plan.save_every
    raise JobFailed(f"{KILLS_MAX} saves were quicker than the kill")


def _run_and_kill(plan: Plan, screen: Screen, record: Record, kill_from: int) -> int:
    killed_at = None
    with Job(RANKS, plan.arguments(resume=latest(plan.root)), plan.log) as job:
        # Goes on after the kill: what was told before it is still in the pipe.
        for event in job.events():
            record.hear(event)
            screen.follow(event, record, plan.steps)
            # The first rank is done and the others are not: as much of a checkpoint as there can be without a commit.
            if killed_at is None and event["kind"] == "uploaded" and event["step"] >= kill_from:
                job.kill()
                killed_at = int(event["step"])
        if killed_at is None:
            job.finish()
            raise JobFailed(f"no save began after step {kill_from}, so there was nothing to interrupt")
    return killed_at


def train(plan: Plan, screen: Screen, *, ranks: int, save: bool, resume: str | None = None) -> Record:
    """Train to the last step."""
    record = Record(ranks)
    with Job(ranks, plan.arguments(save=save, resume=resume), plan.log) as job:
        for event in job.events():
            record.hear(event)
            screen.follow(event, record, plan.steps)
        job.finish()
    return record


def _state(plan: Plan, step: int) -> str:
    states = {info.name: info.state for info in list_checkpoints(plan.root)}
    return states.get(step_name(step), "absent")


def tell_the_story(plan: Plan, screen: Screen) -> Outcome:
    screen.chapter(f"1  Training on {RANKS} ranks, with a save every {plan.save_every} steps")
    screen.say(f"to {plan.root}/step-N")
    killed, killed_at = train_until_killed(plan, screen)
    left = _state(plan, killed_at)
    screen.say(f"[red]✗ SIGKILL[/] to every process, in the middle of the save of step {killed_at}")
    url = latest(plan.root)
    if url is None:
        raise JobFailed("nothing was committed before the kill")
    resumed_from = step_of(url)
    screen.say(f"  {step_name(killed_at)} is {left}; the latest committed is {step_name(resumed_from)}")

    screen.chapter(f"2  Resuming on {RANKS_RESUMED} ranks from {step_name(resumed_from)}")
    resumed = train(plan, screen, ranks=RANKS_RESUMED, save=True, resume=url)
    last = latest(plan.root)

    screen.chapter(f"3  The same training on {RANKS} ranks, never stopped and never saved")
    reference = train(plan, screen, ranks=RANKS, save=False)
    return Outcome(
        steps=plan.steps,
        killed=killed,
        resumed=resumed,
        reference=reference,
        killed_at=killed_at,
        state_after_kill=left,
        resumed_from=resumed_from,
        digests=digests_equal(plan.out / "digests", resumed_from),
        last_committed=last is not None and step_of(last) == plan.steps // plan.save_every * plan.save_every,
    )


@contextlib.contextmanager
def place(url: str | None, screen: Screen) -> Iterator[str]:
    """A fresh root URL, under `url` or on a server that lives as long as this block."""
    run = time.strftime("run-%Y%m%d-%H%M%S")
    if url:
        yield f"{url.removesuffix('/')}/{run}"
        return
    import localstack

    screen.chapter("0  Starting an S3 server (SeaweedFS)")
    with localstack.start("seaweedfs") as server:
        os.environ.update(server.env)
        server.create_bucket("demo")
        screen.say(f"{server.endpoint_url}, bucket demo")
        yield f"s3://demo/{run}"


def main() -> int:
    args = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    out = Path("out/demo").absolute()
    save_every = max(2, args.steps // 8)
    _clear(out)
    began = time.monotonic()
    with Screen(plain_every=save_every) as screen:
        try:
            with place(args.url, screen) as root:
                outcome = tell_the_story(Plan(root, out, args.steps, save_every), screen)
        except (JobFailed, CkptCloudError) as failure:
            screen.console.print(f"\n{failure}", style="red", markup=False)
            return 1
        except KeyboardInterrupt:
            screen.console.print("\nInterrupted; every process of the demo is gone.")
            return 130
        verdict = judge(outcome)
        draw(outcome.curves(), out / "loss.png")
        screen.close([*outcome.rows(), ("time", f"{time.monotonic() - began:.0f} s")], verdict)
        screen.console.print(f"\n  Both loss curves: {out / 'loss.png'}\n", soft_wrap=True)
    return 0 if all(holds for _, holds in verdict) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__)
    parser.add_argument("--url", help="save under this URL (s3://, gs://, az://, file://, ...) and leave it there")
    parser.add_argument("--steps", type=int, default=96, help="training steps (default: 96)")
    args = parser.parse_args()
    if args.steps < 16:
        parser.error("--steps must be at least 16")
    return args


def _clear(out: Path) -> None:
    (out / "digests").mkdir(parents=True, exist_ok=True)
    for stale in [out / "train.log", out / "loss.png", *(out / "digests").glob("*.json")]:
        stale.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
