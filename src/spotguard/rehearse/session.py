"""The rehearsal itself: one run untouched, one under interruptions, restarted as a scheduler would until it is done."""

import contextlib
import dataclasses
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from spotguard.errors import CheckpointError, ConfigError
from spotguard.rehearse.outcome import Compared, compare_checkpoints, final_checkpoint
from spotguard.rehearse.page import write_page
from spotguard.rehearse.plan import Interruption, check_counts, plan_interruptions, save_interval
from spotguard.rehearse.process import Answer, Gatekeeper, Message, tail
from spotguard.rehearse.record import Recorder, Start, account
from spotguard.rehearse.report import HOPELESS, Report, judge, unlike_generators

__all__ = ["Observer", "RehearsalOptions", "rehearse"]

_HOLD = 0.05  # seconds at a boundary for a SIGTERM to be heard by the guard; it takes a millisecond
_HOLDS = 20  # boundaries, on a machine that is busier than that


@dataclasses.dataclass(frozen=True, kw_only=True)
class RehearsalOptions:
    """How to rehearse.

    Attributes:
        seed: Of the plan; None for a new one.
        sigterm: How many SIGTERMs.
        sigkill: How many SIGKILLs.
        every: Steps between saves in the interrupted run; None for a twelfth of the run.
        timeout: Seconds that one start may take.
        output: Directory for the page, the report and the logs.
    """

    seed: int | None = None
    sigterm: int = 3
    sigkill: int = 3
    every: int | None = None
    timeout: float = 600.0
    output: Path = Path("rehearsal")


class Observer(Protocol):
    """Is told how it goes."""

    def planned(self, plan: Sequence[Interruption], *, seed: int, total_steps: int) -> None:
        """The untouched run is done, and this comes next."""

    def started(self, title: str) -> None:
        """A start of the script."""

    def stepped(self, step: int) -> None:
        """The start under way has come to this step."""

    def ended(self, start: Start) -> None:
        """The process is gone."""


def rehearse(
    command: Sequence[str], options: RehearsalOptions | None = None, observer: Observer | None = None
) -> Report:
    """Run a training script untouched and under interruptions, and compare.

    Args:
        command: How the script is started, as a list: ``["python", "train.py"]``.
        options: See there.
        observer: Told how it goes.

    Returns:
        The report. The page, the same report as JSON and the output of every start are in ``options.output``.

    Raises:
        ConfigError: Nothing could be rehearsed: the command does not start, does not use SpotGuard, or fails when left alone.
    """
    options = options or RehearsalOptions()
    if not command:
        raise ConfigError("nothing to rehearse: name the command, as in 'spotguard rehearse -- python train.py'")
    if shutil.which(command[0]) is None:
        raise ConfigError(
            f"{command[0]}: command not found. Write it as you would start it: 'spotguard rehearse -- python train.py'"
        )
    if options.every is not None and options.every < 1:
        raise ConfigError(f"every={options.every}: at least 1 step between saves")
    check_counts(options.sigterm, options.sigkill)
    _prepare(options.output)
    with (
        tempfile.TemporaryDirectory(prefix="spotguard-rehearsal-") as folder,
        contextlib.closing(Gatekeeper(Path(folder, "gate"))) as gate,
    ):
        report = _Rehearsal(tuple(command), options, observer, Path(folder), gate).perform()
    (options.output / "report.json").write_text(report.to_json() + "\n", encoding="utf-8")
    write_page(report, options.output / "report.html")
    return report


class _Rehearsal:
    def __init__(
        self,
        command: tuple[str, ...],
        options: RehearsalOptions,
        observer: Observer | None,
        folder: Path,
        gate: Gatekeeper,
    ) -> None:
        self._command, self._options, self._observer, self._gate = command, options, observer, gate
        self._untouched_store, self._interrupted_store = folder / "untouched", folder / "interrupted"

    def perform(self) -> Report:
        options = self._options
        seed = options.seed if options.seed is not None else random.SystemRandom().randrange(1_000_000)
        untouched = self._leave_alone()
        members = [shard.name for shard in final_checkpoint(self._untouched_store).manifest.shards]
        plan = plan_interruptions(
            untouched.last_step, seed=seed, sigterm=options.sigterm, sigkill=options.sigkill, shards=members
        )
        every = save_interval(untouched.last_step, options.every)
        self._tell(lambda observer: observer.planned(plan, seed=seed, total_steps=untouched.last_step))
        interrupted = self._interrupt(untouched, plan, every)
        problem: str | None = None
        compared: tuple[Compared, ...] = ()
        if interrupted[-1].finished:
            problem, compared = self._compare(untouched, interrupted)
        verdict, reasons, notes = judge(untouched, interrupted, plan, compared)
        if problem is not None:
            verdict, reasons = "unsafe", (*reasons, problem)
        return Report(
            command=self._command,
            seed=seed,
            every=every,
            verdict=verdict,
            reasons=reasons,
            notes=notes,
            untouched=untouched,
            interrupted=interrupted,
            plan=plan,
            members=compared,
            output=options.output,
        )

    def _leave_alone(self) -> Start:
        start = self._start(1, "untouched", time.monotonic(), self._untouched_store, every=None)
        (start,) = account([start])
        where = f"Its output is in {self._options.output / start.log}, which ends:\n{tail(self._options.output / start.log)}"
        if start.timed_out:
            raise ConfigError(
                f"the untouched run did not end within {self._options.timeout:g} s; give it more with --timeout. {where}"
            )
        if start.exit_code != 0:
            raise ConfigError(f"the untouched run failed with exit status {start.exit_code}; mend that first. {where}")
        if start.opened is None:
            raise ConfigError(
                "the script never opened a SpotGuard, so nothing in it survives an interruption. Put the loop into "
                f"'with SpotGuard(uri, TrainState(model=model, optimizer=optimizer)) as guard:'. {where}"
            )
        if start.uris > 1:
            raise ConfigError(f"the script guards {start.uris} runs in one start; rehearse them one at a time. {where}")
        if not start.finished:
            raise ConfigError(
                f"the untouched run ended before its 'with SpotGuard' block did; is there an os._exit in it? {where}"
            )
        return start

    def _interrupt(self, untouched: Start, plan: Sequence[Interruption], every: int) -> tuple[Start, ...]:
        """Start it again and again, until it is done or does what no scheduler could make good."""
        began, starts, pending = time.monotonic(), list[Start](), list(plan)
        while True:
            number = len(starts) + 1
            start = self._start(
                number,
                "interrupted",
                began,
                self._interrupted_store,
                every=every,
                due=pending[0] if pending else None,
                like=untouched,
            )
            starts.append(start)
            if start.interruption is not None:
                pending.pop(0)
            if not start.left_as_planned or HOPELESS & set(unlike_generators(untouched, starts)):
                return account(starts)

    def _start(
        self,
        number: int,
        run: str,
        began: float,
        store: Path,
        *,
        every: int | None,
        due: Interruption | None = None,
        like: Start | None = None,
    ) -> Start:
        recorder = Recorder(number, time.monotonic() - began)
        holds = 0

        def decide(message: Message) -> Answer:
            nonlocal holds
            now = time.monotonic() - began
            if due is not None and not recorder.struck and due.strikes(message):
                if message["at"] == "boundary":
                    recorder.heard(message, now)
                recorder.strike(due, message, now)
                if due.kind == "SIGKILL":
                    return Answer(reply=None, signal=signal.SIGKILL)
                return Answer(signal=signal.SIGTERM, hold=_HOLD)
            recorder.heard(message, now)
            if message["at"] == "hello":
                return Answer({"uri": str(store), "every": every})
            if message["at"] == "fresh" and like is not None and HOPELESS & set(_unlike(message, like)):
                return Answer(reply=None, signal=signal.SIGKILL)  # the comparison would mean nothing: spare the time
            if message["at"] == "boundary":
                self._tell(lambda observer: observer.stepped(recorder.step))
                if recorder.struck and holds < _HOLDS:
                    holds += 1
                    return Answer(hold=_HOLD)
            return Answer()

        title = (
            "untouched"
            if run == "untouched"
            else f"start {number}: " + (f"{due.kind} due at step {due.step}" if due is not None else "to the end")
        )
        self._tell(lambda observer: observer.started(title))
        log = f"{run}-{number:02d}.log"
        end = self._gate.run(
            self._command, log=self._options.output / log, timeout=self._options.timeout, decide=decide
        )
        start = recorder.result(
            ended=time.monotonic() - began, exit_code=end.exit_code, timed_out=end.timed_out, log=log
        )
        self._tell(lambda observer: observer.ended(start))
        return start

    def _compare(self, untouched: Start, interrupted: tuple[Start, ...]) -> tuple[str | None, tuple[Compared, ...]]:
        fresh = untouched.fresh or {}
        leave_out = {name: fresh.get(name, "") for name in unlike_generators(untouched, interrupted)}
        try:
            finals = final_checkpoint(self._untouched_store), final_checkpoint(self._interrupted_store)
        except CheckpointError as error:
            return f"the final checkpoint cannot be read back: {error}", ()
        return None, compare_checkpoints(*finals, leave_out=leave_out)

    def _tell(self, what: Callable[[Observer], None]) -> None:
        if self._observer is not None:
            what(self._observer)


def _unlike(message: Message, like: Start) -> set[str]:
    ours, theirs = like.fresh or {}, message["rng"]
    return {name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name)}


def _prepare(output: Path) -> None:
    """Make the directory, and clear away what an earlier rehearsal left in it; nothing else."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name in ("report.html", "report.json", "untouched-[0-9]*.log", "interrupted-[0-9]*.log"):
            for path in output.glob(name):
                path.unlink()
    except OSError as error:
        raise ConfigError(f"output={output}: cannot be written to: {error.strerror or error}") from error
