"""What is made of the time between a notice and the end, over many simulated notices on a virtual clock: `python benchmarks/deadlines.py`.

Each notice comes at a random instant of a step of a job of its own: steps and saves take random times around random means, and the
plan (`plan_final_save`) knows nothing but what that job has measured before. A save that is not done by the deadline is cut off, as
the guard does.
``--write FILE`` puts the table where the documentation has it.
"""

import argparse
import dataclasses
import random
import statistics
from collections.abc import Iterator
from pathlib import Path

from spotguard.notices.platforms import reserve_of
from spotguard.policies import FinalSave, SaveTimes, p95, plan_final_save

BEGIN, END = "<!-- simulated: begin -->", "<!-- simulated: end -->"


@dataclasses.dataclass(frozen=True)
class Job:
    """What a job is like: means in seconds, of a step, of the stall of a capture, and of write and commit."""

    step_s: float
    stall_s: float
    write_s: float
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


def meet(job: Job, window_s: float, rng: random.Random) -> Outcome:
    """One notice, from the instant it comes to the exit."""
    stalls = [job.draw(job.stall_s, rng) for _ in range(10)]
    writes = [job.draw(job.write_s, rng) for _ in range(10)]
    deadline = window_s - reserve_of(window_s)
    now, trained, step, committed, worst_step = 0.0, 0.0, 0, -1, job.step_s
    first: tuple[int, float] | None = None  # step of the save in flight, and when it will be committed
    saved = False
    rest = job.draw(job.step_s, rng) * rng.random()  # of the step in which the notice comes
    while True:
        now, trained, step = now + rest, trained + rest, step + 1
        if first is not None and first[1] <= now:
            committed, first = first[0], None
        plan = plan_final_save(
            deadline - now,
            SaveTimes(
                save_s=(p95(stalls) or 0.0) + (p95(writes) or 0.0),
                step_s=worst_step,
                flush_s=max(0.0, first[1] - now) if first is not None else None,
            ),
            window=True,
            saved=saved,
        )
        if not plan.train_s:
            break
        if plan.save_first and first is None:
            stall = job.draw(job.stall_s, rng)
            now += stall
            first, saved = (step, now + job.draw(job.write_s, rng)), True
        rest = job.draw(job.step_s, rng)
        worst_step = max(worst_step, rest)
    if first is not None and plan.choice is not FinalSave.NONE:
        now = max(now, first[1])
        if now <= deadline:
            committed = first[0]
    if plan.choice is FinalSave.FRESH:
        end = now + job.draw(job.stall_s, rng) + job.draw(job.write_s, rng)
        if end <= deadline:
            committed = step
        now = min(end, deadline)  # cut off
    return Outcome(
        committed == step, committed >= 0, min(1.0, trained / window_s), step - max(committed, 0), now > window_s
    )


def jobs(window_s: float, count: int, seed: int) -> Iterator[tuple[Job, random.Random]]:
    """Jobs whose saves fit into the window many times, or hardly at all."""
    for number in range(count):
        rng = random.Random(f"{seed} {window_s} {number}")
        write = window_s * rng.uniform(0.005, 0.06)
        yield (
            Job(step_s=window_s * rng.uniform(0.001, 0.02), stall_s=write * rng.uniform(0.02, 0.2), write_s=write),
            rng,
        )


def simulate(window_s: float, count: int = 1000, seed: int = 0) -> list[Outcome]:
    """So many notices with so many seconds each."""
    return [meet(job, window_s, rng) for job, rng in jobs(window_s, count, seed)]


def table(count: int, seed: int) -> str:
    """As Markdown."""
    lines = [
        (
            "| window | fresh commit | a commit after the notice "
            "| of the window spent training, median (worst of 20) | lost steps, mean | overruns |"
        ),
        "|---|---|---|---|---|---|",
    ]
    for window in (120.0, 30.0, 15.0):
        found = simulate(window, count, seed)
        trained = sorted(outcome.trained for outcome in found)
        lines.append(
            f"| {window:.0f} s | {share(outcome.fresh for outcome in found)} | {share(outcome.saved for outcome in found)} "
            f"| {statistics.median(trained):.0%} ({trained[len(trained) // 20]:.0%}) "
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
