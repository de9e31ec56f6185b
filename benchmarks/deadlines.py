"""What is made of the time between a notice and the end, over many simulated notices on a virtual clock: `python benchmarks/deadlines.py`.

Each notice comes at a random instant of a step of a job of its own: steps, saves and deletes take random times around random means. It may
find a periodic save in flight, or the sweep behind the last one, and a save may fail. The plan (`plan_final_save`) knows nothing but what
that job has measured before: not how long a step or a save will take, nor what is left of one that is under way. A save that is not done
by the deadline is cut off, as the guard does.
``--write FILE`` puts the table where the documentation has it.
"""

import argparse
import dataclasses
import random
import statistics
from collections.abc import Iterator
from pathlib import Path

from spotguard.notices.platforms import reserve_of
from spotguard.policies import FinalSave, SaveTimes, p95, plan_final_save, time_left, with_margin

BEGIN, END = "<!-- simulated: begin -->", "<!-- simulated: end -->"
MEASURED = (5, 60)  # saves before the notice
BUSY, SWEEPING = 0.3, 0.3  # shares of the notices that find a save in flight, or a sweep
FAILS, STALLS = 0.02, 0.01  # shares of the saves that fail, or take five times as long
YIELD_S = 2.0  # how long a save waits for the request of a sweep, at the most
AGAIN_S, ROOM = 1.0, 3.0  # as the guard has them


@dataclasses.dataclass(frozen=True)
class Job:
    """What a job is like: means in seconds, of a step, of a capture, of write and commit, of a delete, and between two saves."""

    step_s: float
    stall_s: float
    write_s: float
    delete_s: float
    every_s: float
    spread: float = 0.2

    def draw(self, mean: float, rng: random.Random) -> float:
        """One duration: log-normal, and once in fifty times twice as long."""
        return rng.lognormvariate(0, self.spread) * mean * (2 if rng.random() < 0.02 else 1)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one notice.

    Attributes:
        fresh: The last boundary is committed.
        saved: A boundary after the notice is committed.
        trained: Share of the window that went into training.
        lost: Steps that the next start has to do again.
        overrun: Something was committed, or still running, after the deadline.
    """

    fresh: bool
    saved: bool
    trained: float
    lost: int
    overrun: bool


@dataclasses.dataclass
class Flight:
    """A save that is being written: of which step, from when to when, and whether it will fail."""

    step: int
    began: float
    ends: float
    fails: bool


class Notice:
    """One notice, from the instant it comes to the exit."""

    def __init__(self, job: Job, window_s: float, rng: random.Random) -> None:
        self.job, self.window_s, self.rng = job, window_s, rng
        self.deadline = window_s - reserve_of(window_s)
        self.now, self.trained, self.step = 0.0, 0.0, 0
        measured = rng.randint(*MEASURED)
        self.stalls = [job.draw(job.stall_s, rng) for _ in range(measured)]
        self.writes = [self.write() for _ in range(measured)]
        self.steps = [job.draw(job.step_s, rng) for _ in range(100)]
        self.committed, self.error, self.overrun = -1, False, False
        self.tried_at: float | None = None
        self.due = job.every_s * rng.random()
        self.flight: Flight | None = None
        self.sweep_ends = job.draw(job.delete_s, rng) * rng.random() if rng.random() < SWEEPING else 0.0
        if rng.random() < BUSY:
            takes = self.write()
            elapsed = takes * rng.random()
            self.flight = Flight(-1, -elapsed, takes - elapsed, fails=False)

    def write(self) -> float:
        """How long one takes."""
        return self.job.draw(self.job.write_s, self.rng) * (5 if self.rng.random() < STALLS else 1)

    def land(self, until: float) -> None:
        """See whether what is in flight is done by an instant."""
        flight = self.flight
        if flight is None or flight.ends > until:
            return
        self.flight, self.error = None, flight.fails
        if not flight.fails:
            self.writes.append(flight.ends - flight.began)
            self.committed = max(self.committed, flight.step)
            if flight.step < 0:  # it was made without a deadline, so a sweep follows
                self.sweep_ends = flight.ends + self.job.draw(self.job.delete_s, self.rng)

    def save(self, limit: float) -> None:
        """Begin one; the loop stands still for the capture."""
        stall = self.job.draw(self.job.stall_s, self.rng)
        self.stalls.append(stall)
        self.now += stall
        patience = min(YIELD_S, max(0.0, limit - self.now) / 4)
        begins = self.now + min(patience, max(0.0, self.sweep_ends - self.now))
        self.sweep_ends = 0.0
        self.flight = Flight(self.step, self.now, begins + self.write(), fails=self.rng.random() < FAILS)
        self.due = self.now + self.job.every_s

    def times(self) -> SaveTimes:
        """What the guard would have measured."""
        writes = p95(self.writes) or 0.0
        return SaveTimes(
            save_s=(p95(self.stalls) or 0.0) + writes,
            step_s=p95(self.steps[-100:]) or 0.0,
            flush_s=None if self.flight is None else time_left(writes, self.now - self.flight.began),
        )

    def train(self, seconds: float) -> None:
        """To the next boundary."""
        self.now, self.trained, self.step = self.now + seconds, self.trained + seconds, self.step + 1
        self.steps.append(seconds)
        self.land(self.now)

    def meet(self) -> Outcome:
        """All of it."""
        self.train(
            self.job.draw(self.job.step_s, self.rng) * self.rng.random()
        )  # the rest of the step in which it comes
        while True:
            times = self.times()
            saved = self.tried_at is not None and (self.flight is not None or not self.error)
            plan = plan_final_save(self.deadline - self.now, times, window=True, saved=saved)
            if not plan.train_s:
                break
            save_s = times.save_s or 0.0
            if self.flight is None:
                again = self.tried_at is None or self.now >= self.tried_at + max(AGAIN_S, save_s)
                if plan.save_first and again:
                    self.tried_at = self.now
                    self.save(self.deadline)
                elif not plan.save_first and self.now >= self.due and plan.train_s >= ROOM * with_margin(save_s):
                    self.save(self.deadline)
            self.train(self.job.draw(self.job.step_s, self.rng))
        self.leave(plan.choice)
        fresh, lost = self.committed == self.step, self.step - max(self.committed, 0)
        return Outcome(fresh, self.committed >= 0, min(1.0, self.trained / self.window_s), lost, self.overrun)

    def leave(self, choice: FinalSave) -> None:
        """The last save: what is in flight is waited for, and one that has failed is made again while there is time."""
        late = self.now >= self.deadline  # then nothing is cut off
        limit = float("inf") if late else self.deadline
        if choice is FinalSave.NONE:
            return
        self.wait(limit)
        if (
            choice is FinalSave.FLUSH and self.flight is None
        ):  # is there time for another, now that it is known how long that took?
            choice = plan_final_save(limit - self.now, self.times()).choice
        tries = 0
        while choice is FinalSave.FRESH and self.flight is None and (self.committed != self.step or self.error):
            self.now += AGAIN_S if tries > 1 else 0.0
            self.save(limit)
            self.wait(limit)
            tries += 1
        self.overrun = self.now > self.window_s

    def wait(self, limit: float) -> None:
        """For what is in flight."""
        if self.flight is not None:
            self.now = max(self.now, min(self.flight.ends, limit))
            self.land(limit)


def jobs(window_s: float, count: int, seed: int) -> Iterator[tuple[Job, random.Random]]:
    """Jobs whose saves fit into the window many times, or hardly at all."""
    for number in range(count):
        rng = random.Random(f"{seed} {window_s} {number}")
        write = window_s * rng.uniform(0.005, 0.06)
        job = Job(
            step_s=window_s * rng.uniform(0.001, 0.02),
            stall_s=write * rng.uniform(0.02, 0.2),
            write_s=write,
            delete_s=rng.uniform(0.02, 5.0),
            every_s=window_s * rng.uniform(0.3, 5.0),
        )
        yield job, rng


def simulate(window_s: float, count: int = 1000, seed: int = 0) -> list[Outcome]:
    """So many notices with so many seconds each."""
    return [Notice(job, window_s, rng).meet() for job, rng in jobs(window_s, count, seed)]


def table(count: int, seed: int) -> str:
    """As Markdown."""
    lines = [
        (
            "| window | fresh commit | a commit after the notice "
            "| of the window spent training, median (worst of 20, worst) | lost steps, mean | overruns |"
        ),
        "|---|---|---|---|---|---|",
    ]
    for window in (120.0, 30.0, 15.0):
        found = simulate(window, count, seed)
        trained = sorted(outcome.trained for outcome in found)
        lines.append(
            f"| {window:.0f} s | {share(outcome.fresh for outcome in found)} | {share(outcome.saved for outcome in found)} "
            f"| {statistics.median(trained):.0%} ({trained[len(trained) // 20]:.0%}, {trained[0]:.0%}) "
            f"| {statistics.mean(outcome.lost for outcome in found):.2f} | {sum(outcome.overrun for outcome in found)} |"
        )
    return "\n".join(lines)


def share(found: Iterator[bool]) -> str:
    values = list(found)
    return f"{sum(values) / len(values):.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--notices", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, metavar="FILE")
    options = parser.parse_args()
    text = table(options.notices, options.seed)
    print(text)
    if options.write:
        page = options.write.read_text(encoding="utf-8")
        head, tail = page.split(BEGIN)[0], page.split(END)[1]
        options.write.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
