"""What one start of the script did, and where its time went."""

import bisect
import dataclasses
from collections.abc import Mapping
from typing import Any

from spotguard.rehearse.plan import Interruption

__all__ = ["KILLED", "Delivered", "Message", "Segment", "Spent", "Start", "Strike", "account"]

Message = Mapping[str, Any]
"""What a guard says at one place."""

KILLED = 137
"""Exit status of what was killed, as a shell tells it."""


@dataclasses.dataclass(frozen=True)
class Segment:
    """A stretch of time within a run, in seconds from its beginning.

    Attributes:
        kind: ``"startup"``, ``"restore"``, ``"training"``, ``"stall"`` or ``"lost"``.
        begin: Where it begins.
        end: Where it ends.
    """

    kind: str
    begin: float
    end: float

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.end - self.begin


@dataclasses.dataclass(frozen=True)
class Spent:
    """Seconds of one start, or of a run, each second counted once.

    Attributes:
        startup: Starting the interpreter, imports, building the model; and leaving.
        restore: Finding, verifying and reading the checkpoint.
        training: Steps that count.
        stall: The loop stood still for a save.
        lost: Steps that had to be done again.
    """

    startup: float = 0.0
    restore: float = 0.0
    training: float = 0.0
    stall: float = 0.0
    lost: float = 0.0

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


@dataclasses.dataclass(frozen=True)
class Delivered:
    """Something that was delivered.

    Attributes:
        at: When, in seconds from the beginning of the run.
        what: In words.
        kind: ``"notice"``, ``"sigterm"`` for any signal that can be handled, ``"frozen"`` or ``"sigkill"``.
        trouble: Why it could not come through; empty when it could.
        heard_at: When somebody asked the metadata service and was told; None when nobody did.
    """

    at: float
    what: str
    kind: str
    trouble: str = ""
    heard_at: float | None = None


@dataclasses.dataclass(frozen=True)
class Strike:
    """An interruption that came to pass.

    Attributes:
        interruption: Which one.
        at: When it began, in seconds from the beginning of the run.
        step: The step at which it began.
        where: The place, in words.
        delivered: What was delivered before the process had ended.
    """

    interruption: Interruption
    at: float
    step: int
    where: str
    delivered: tuple[Delivered, ...] = ()

    @property
    def kind(self) -> str:
        """Which one, in a word."""
        return self.interruption.kind

    @property
    def complete(self) -> bool:
        """Whether all of it has been delivered."""
        return len(self.delivered) == len(self.interruption.deliveries)

    @property
    def notices(self) -> tuple[Delivered, ...]:
        """What the metadata service told of it."""
        return tuple(done for done in self.delivered if done.kind == "notice")

    @property
    def asked_at(self) -> float | None:
        """When the process was told to go, or was killed without a word; None where it is to go on, or had not been told yet."""
        scenario = self.interruption.scenario
        after = 0.0 if scenario is None else scenario.asks_s
        due = [one.at_s for one in self.interruption.deliveries[: len(self.delivered)]]
        return next((done.at for at_s, done in zip(due, self.delivered, strict=True) if at_s == after), None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """One start of the script.

    Attributes:
        number: From 1 within its run.
        began: Seconds from the beginning of the run; as all times here.
        ended: The process was gone.
        exit_code: As `subprocess` has it.
        timed_out: It did not end and was killed for that.
        uri: What the script gave to SpotGuard; None when it never opened one.
        uris: How many different ones.
        resumed_from: Id of the checkpoint; None for a fresh start.
        first_step: Where it began.
        last_step: The last boundary it told of.
        restore_s: What the guard measured for resolve, verify, read and restore.
        fresh: Fingerprints of the generators at a fresh start.
        troubles: Damaged checkpoints that were passed over, and state that did not come back bit for bit.
        strikes: The interruptions that came to pass, in order; all but the last one it has outlived.
        killed_at: When a platform killed it.
        exit_state: What ``exit.json`` in the run says of this start, under torchrun, which makes one exit status of all.
        stopped: The guard left on its own accord, with this exit status.
        stopping: When it began to.
        finished: The loop came to its end.
        commits: When each checkpoint became visible, and its step.
        stalls: Of each snapshot, in seconds.
        saves: Of each checkpoint, in seconds, from the snapshot to the commit.
        lost_steps: Steps to redo, known once the next start has told where it resumed.
        segments: Where the time went, in order, without gaps.
        log: Name of the file with its output.
        boundaries: Steps and times, until the time is accounted for.
        waits: When the loop stood still for a save, from and to.
        opened: When the guard was entered; None when it never was.
        ready: When it had restored, or begun from zero.
        left: When it had stopped or finished.
    """

    number: int
    began: float
    ended: float
    exit_code: int
    timed_out: bool = False
    uri: str | None = None
    uris: int = 0
    resumed_from: str | None = None
    first_step: int = 0
    last_step: int = 0
    restore_s: float = 0.0
    fresh: Mapping[str, str] | None = None
    troubles: tuple[str, ...] = ()
    strikes: tuple[Strike, ...] = ()
    killed_at: float | None = None
    exit_state: str | None = None
    stopped: int | None = None
    stopping: float | None = None
    finished: bool = False
    commits: tuple[tuple[float, int], ...] = ()
    stalls: tuple[float, ...] = ()
    saves: tuple[float, ...] = ()
    lost_steps: int = 0
    segments: tuple[Segment, ...] = ()
    log: str = ""
    boundaries: tuple[tuple[int, float], ...] = dataclasses.field(default=(), repr=False)
    waits: tuple[tuple[float, float], ...] = dataclasses.field(default=(), repr=False)
    ready: float | None = dataclasses.field(default=None, repr=False)
    opened: float | None = dataclasses.field(default=None, repr=False)
    left: float | None = dataclasses.field(default=None, repr=False)

    @property
    def strike(self) -> Strike | None:
        """The last interruption: the one that ended it, if any did."""
        return self.strikes[-1] if self.strikes else None

    @property
    def left_as_planned(self) -> bool:
        """Whether it ended, after an interruption, in the way that makes a scheduler start it again."""
        if self.strike is None or self.timed_out:
            return False
        if self.exit_state is not None:  # torchrun: 1 after everything
            return self.exit_code != 0 and (
                self.killed or self.strike.kind == "SIGKILL" or self.exit_state == "preempted"
            )
        if self.killed or self.strike.kind == "SIGKILL":
            return self.status == KILLED
        return self.stopped is not None and self.status == self.stopped

    @property
    def status(self) -> int:
        """The exit status as a shell tells it: 143 for an end by SIGTERM."""
        return self.exit_code if self.exit_code >= 0 else 128 - self.exit_code

    @property
    def killed(self) -> bool:
        """Whether a platform killed it, because it had not ended by itself."""
        return self.killed_at is not None and self.status == KILLED

    @property
    def window(self) -> tuple[float, float] | None:
        """From the moment when it was told to go up to its end; None where nobody told it."""
        asked_at = self.strike.asked_at if self.strike is not None else None
        return None if asked_at is None else (asked_at, self.ended)

    @property
    def window_s(self) -> float | None:
        """How long that was, in seconds."""
        return None if self.window is None else self.window[1] - self.window[0]

    @property
    def trained_in_window_s(self) -> float:
        """Seconds of that in which steps were done that count."""
        begin, end = self.window or (self.ended, self.ended)
        parts = [part for part in self.segments if part.kind == "training"]
        return sum(max(0.0, min(part.end, end) - max(part.begin, begin)) for part in parts)

    @property
    def committed_after_notice(self) -> int:
        """Checkpoints that became visible in that time."""
        begin, end = self.window or (self.ended, self.ended)
        return sum(begin <= at <= end for at, _ in self.commits)

    @property
    def step_s(self) -> float:
        """Seconds that a step took, on average."""
        return (self.spent.training + self.spent.lost) / max(1, self.last_step - self.first_step)

    @property
    def spent(self) -> Spent:
        """The sums of the segments."""
        sums: dict[str, float] = {}
        for segment in self.segments:
            sums[segment.kind] = sums.get(segment.kind, 0.0) + segment.seconds
        return Spent(**sums)


def account(starts: list[Start]) -> tuple[Start, ...]:
    """Work out, for the starts of one run, which steps were lost and where the time went."""
    done = []
    for index, start in enumerate(starts):
        following = starts[index + 1] if index + 1 < len(starts) else None
        kept = start.last_step if following is None or following.opened is None else following.first_step
        lost_steps = max(0, start.last_step - kept)
        done.append(
            dataclasses.replace(
                start, lost_steps=lost_steps, segments=_segments(start, kept if lost_steps else None), boundaries=()
            )
        )
    return tuple(done)


def _segments(start: Start, kept: int | None) -> tuple[Segment, ...]:
    opened = start.ended if start.opened is None else start.opened
    ready = start.ended if start.ready is None else start.ready
    left = start.ended if start.left is None else start.left
    found = [Segment("startup", start.began, opened), Segment("restore", opened, ready)]
    lost_from = left
    if kept is not None:
        reached = bisect.bisect_right([step for step, _ in start.boundaries], kept)
        lost_from = start.boundaries[reached - 1][1] if reached else ready
    at = ready
    for begin, end in [*_merged(start.waits), (left, left)]:
        for kind, low, high in (("training", at, min(begin, lost_from)), ("lost", max(at, lost_from), begin)):
            if high > low:
                found.append(Segment(kind, low, high))
        if end > max(begin, at):
            found.append(Segment("stall", max(begin, at), end))
        at = max(at, end)
    found.append(Segment("startup", at, start.ended))
    return tuple(segment for segment in found if segment.seconds > 0)


def _merged(waits: tuple[tuple[float, float], ...]) -> list[tuple[float, float]]:
    merged: list[tuple[float, float]] = []
    for begin, end in sorted(waits):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged
