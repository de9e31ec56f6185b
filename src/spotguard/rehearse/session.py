"""The rehearsal itself: one run untouched, one under interruptions, restarted as a scheduler would until it is done."""

import contextlib
import dataclasses
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from spotguard.checkpoint import ExitRecord
from spotguard.checkpoint.layout import EXIT
from spotguard.errors import CheckpointError, ConfigError, SpotguardError
from spotguard.pipeline.objects import read_object
from spotguard.rehearse.outcome import Compared, compare_checkpoints, final_checkpoint
from spotguard.rehearse.page import write_page
from spotguard.rehearse.plan import Interruption, check_counts, check_room, plan_interruptions, save_interval
from spotguard.rehearse.process import Gatekeeper, tail
from spotguard.rehearse.record import Start, account
from spotguard.rehearse.recorder import Recorder
from spotguard.rehearse.report import HOPELESS, Report, judge, unlike_generators
from spotguard.rehearse.scenario import LEAST_GRACES
from spotguard.rehearse.scene import Scene
from spotguard.rehearse.site import Site
from spotguard.rehearse.slow_store import SlowStore
from spotguard.stores import LocalObjectStore

__all__ = ["Observer", "RehearsalOptions", "rehearse"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RehearsalOptions:
    """How to rehearse.

    Attributes:
        seed: Of the plan; None for a new one.
        platform: Whose interruptions are rehearsed, each once: ``"aws"``, ``"gcp"``, ``"azure"``, ``"k8s"``, ``"slurm"``,
            ``"sagemaker"`` or ``"torchrun"``; None for single signals.
        grace_s: Seconds that the platform leaves; None for what it leaves unless it is set up otherwise.
        sigterm: How many SIGTERMs; None for 3, or none beside those of a platform.
        sigkill: How many SIGKILLs; likewise.
        slow_store: How slow writing is made; None for as fast as it is.
        every: Steps between saves in the interrupted run; None for a twelfth of the run.
        timeout: Seconds that one start may take.
        output: Directory for the page, the report and the logs.
    """

    seed: int | None = None
    platform: str | None = None
    grace_s: float | None = None
    sigterm: int | None = None
    sigkill: int | None = None
    slow_store: SlowStore | None = None
    every: int | None = None
    timeout: float = 600.0
    output: Path = Path("rehearsal")

    @property
    def signals(self) -> tuple[int, int]:
        """How many SIGTERMs and SIGKILLs."""
        usual = 3 if self.platform is None else 0
        return (
            usual if self.sigterm is None else self.sigterm,
            usual if self.sigkill is None else self.sigkill,
        )


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
    check_counts(*options.signals, 0 if options.platform is None else 1)
    with tempfile.TemporaryDirectory(prefix="spotguard-rehearsal-") as folder:
        nothing = Path(folder, "firmware")
        nothing.mkdir()
        with (
            Site(options.platform, options.grace_s, nothing) as site,
            contextlib.closing(Gatekeeper(Path(folder, "gate"))) as gate,
        ):
            _prepare(options.output)
            report = _Rehearsal(tuple(command), options, observer, Path(folder), gate, site).perform()
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
        site: Site,
    ) -> None:
        self._command, self._options, self._observer = command, options, observer
        self._gate, self._site = gate, site
        self._exits: dict[Path, int] = {}
        self._untouched_store, self._interrupted_store = folder / "untouched", folder / "interrupted"

    def perform(self) -> Report:
        options = self._options
        seed = options.seed if options.seed is not None else random.SystemRandom().randrange(1_000_000)
        untouched = self._leave_alone()
        members = [shard.name for shard in final_checkpoint(self._untouched_store).manifest.shards]
        train_s = untouched.spent.training + untouched.spent.stall
        least_s = LEAST_GRACES.get(options.platform or "", 1.0)
        check_room(self._site.scenarios, train_s=train_s, grace_s=self._site.grace_s, least_s=least_s)
        sigterm, sigkill = options.signals
        plan = plan_interruptions(
            untouched.last_step,
            seed=seed,
            sigterm=sigterm,
            sigkill=sigkill,
            shards=members,
            scenarios=self._site.scenarios,
            steps_per_s=untouched.last_step / train_s,
        )
        every = save_interval(untouched.last_step, options.every)
        self._tell(lambda observer: observer.planned(plan, seed=seed, total_steps=untouched.last_step))
        interrupted = self._interrupt(untouched, plan, every)
        problem: str | None = None
        compared: tuple[Compared, ...] = ()
        if interrupted[-1].finished:
            problem, compared = self._compare(untouched, interrupted)
        verdict, reasons, notes = judge(untouched, interrupted, plan, compared, layer=self._site.layer)
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
            platform=options.platform,
            grace_s=None if options.platform is None else self._site.grace_s,
            slow_store=options.slow_store,
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
                pending=pending,
                like=untouched,
            )
            starts.append(start)
            del pending[: len(start.strikes)]
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
        pending: Sequence[Interruption] = (),
        like: Start | None = None,
    ) -> Start:
        slow = self._options.slow_store
        welcome = {"uri": str(store), "every": every, "slow": slow and dataclasses.asdict(slow)}
        recorder = Recorder(number, time.monotonic() - began)
        scene = Scene(
            recorder,
            self._site,
            began,
            pending=pending,
            welcome=welcome,
            like=like,
            on_step=lambda step: self._tell(lambda observer: observer.stepped(step)),
        )
        title = (
            "untouched"
            if run == "untouched"
            else f"start {number}: " + (f"{pending[0].kind} due at step {pending[0].step}" if pending else "to the end")
        )
        self._tell(lambda observer: observer.started(title))
        self._site.refresh()
        log = f"{run}-{number:02d}.log"
        end = self._gate.run(
            self._command,
            environment=self._site.environment,
            log=self._options.output / log,
            timeout=self._options.timeout,
            director=scene,
        )
        if self._options.platform == "torchrun" and end.itself:
            raise ConfigError(
                f"with --platform torchrun write the command as you start it, torchrun and all: {self._command[0]} runs the training itself"
            )
        start = recorder.result(
            ended=time.monotonic() - began,
            exit_code=end.exit_code,
            timed_out=end.timed_out,
            log=log,
            heard=[None if at is None else at - began for at in self._site.heard],
            exit_state=self._exit_state(store),
        )
        self._tell(lambda observer: observer.ended(start))
        return start

    def _exit_state(self, store: Path) -> str | None:
        """What the run says itself of this start, where the exit status does not tell."""
        if self._options.platform != "torchrun":
            return None
        try:
            record = ExitRecord.from_bytes(read_object(LocalObjectStore(store), EXIT), key=EXIT)
        except (SpotguardError, OSError):
            return "unknown"
        known, self._exits[store] = self._exits.get(store), record.attempt
        return "unknown" if known == record.attempt else record.state  # that of an older start says nothing

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


def _prepare(output: Path) -> None:
    """Make the directory, and clear away what an earlier rehearsal left in it; nothing else."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name in ("report.html", "report.json", "untouched-[0-9]*.log", "interrupted-[0-9]*.log"):
            for path in output.glob(name):
                path.unlink()
    except OSError as error:
        raise ConfigError(f"output={output}: cannot be written to: {error.strerror or error}") from error
