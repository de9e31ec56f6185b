"""What one start of the script did, told by its guard, and where its time went."""

import bisect
import dataclasses
from collections.abc import Mapping
from typing import Any

from spotguard.checkpoint.layout import parse_manifest_key
from spotguard.rehearse.plan import Interruption, object_name, place_in_words

__all__ = ["Recorder", "Segment", "Spent", "Start", "account"]

Message = Mapping[str, Any]


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
        interruption: The signal that was sent, or None.
        struck_at: When it was sent.
        struck_step: The step at which it was sent.
        struck_where: The place, in words.
        stopped: The guard left on its own accord, with this exit status.
        finished: The loop came to its end.
        commits: When each checkpoint became visible, and its step.
        stalls: Of each snapshot, in seconds.
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
    interruption: Interruption | None = None
    struck_at: float | None = None
    struck_step: int | None = None
    struck_where: str = ""
    stopped: int | None = None
    finished: bool = False
    commits: tuple[tuple[float, int], ...] = ()
    stalls: tuple[float, ...] = ()
    lost_steps: int = 0
    segments: tuple[Segment, ...] = ()
    log: str = ""
    boundaries: tuple[tuple[int, float], ...] = dataclasses.field(default=(), repr=False)
    waits: tuple[tuple[float, float], ...] = dataclasses.field(default=(), repr=False)
    ready: float | None = dataclasses.field(default=None, repr=False)
    opened: float | None = dataclasses.field(default=None, repr=False)
    left: float | None = dataclasses.field(default=None, repr=False)

    @property
    def left_as_planned(self) -> bool:
        """Whether it ended by its interruption in the way that makes a scheduler start it again."""
        if self.interruption is None or self.timed_out:
            return False
        if self.interruption.kind == "SIGKILL":
            return self.exit_code in (-9, 137)  # 137 is what a shell in between makes of it
        return self.stopped is not None and self.exit_code == self.stopped

    @property
    def spent(self) -> Spent:
        """The sums of the segments."""
        sums: dict[str, float] = {}
        for segment in self.segments:
            sums[segment.kind] = sums.get(segment.kind, 0.0) + segment.seconds
        return Spent(**sums)


class Recorder:
    """Listens to the messages of one start.

    Args:
        number: Of the start.
        began: When it was started.
    """

    def __init__(self, number: int, began: float) -> None:
        self._fields: dict[str, Any] = {"number": number, "began": began}
        self._uris: set[str] = set()
        self._boundaries: list[tuple[int, float]] = []
        self._waits: list[tuple[float, float]] = []
        self._commits: list[tuple[float, int]] = []
        self._stalls: list[float] = []

    @property
    def step(self) -> int:
        """The last one heard of."""
        if "last_step" in self._fields:
            return int(self._fields["last_step"])
        return self._boundaries[-1][0] if self._boundaries else int(self._fields.get("first_step", 0))

    @property
    def struck(self) -> bool:
        """Whether a signal has been sent."""
        return "interruption" in self._fields

    def heard(self, message: Message, now: float) -> None:
        """Take a message that is going to be answered."""
        at, fields = message["at"], self._fields
        if at == "hello":
            fields.setdefault("uri", str(message["uri"]))
            self._uris.add(str(message["uri"]))
            fields.setdefault("opened", now)
        elif at in ("fresh", "resumed"):
            fields.setdefault("ready", now)
            fields["fresh"] = message.get("rng")
            fields["first_step"] = message.get("step", 0)
            fields["resumed_from"] = message.get("checkpoint")
            fields["restore_s"] = message.get("seconds", 0.0)
            fields["troubles"] = (*message.get("rejected", ()), *message.get("inexact", ()))
        elif at == "boundary":
            self._boundaries.append((int(message["step"]), now))
        elif at == "snapshot":
            self._stalls.append(float(message["stall"]))
            self._waits.append((now - float(message["stall"]), now))
        elif at == "published" and (identity := parse_manifest_key(message["key"])) is not None:
            self._commits.append((now, identity.step))
        elif at == "stopped":
            fields["stopped"], fields["left"] = int(message.get("code", 143)), now
            self._waits.append((now - float(message["seconds"]), now))
        elif at == "finished":
            fields["finished"], fields["left"], fields["last_step"] = True, now, int(message["step"])
            last = self._boundaries[-1][1] if self._boundaries else now
            if self._waits and self._waits[-1][1] > last:  # the save at the end, which is waited for
                self._waits.append((self._waits[-1][0], now))

    def strike(self, interruption: Interruption, message: Message, now: float) -> None:
        """A signal is being sent at this message."""
        name = object_name(message["key"]) if "key" in message else ""
        where = place_in_words(interruption.place, name)
        self._fields.update(interruption=interruption, struck_at=now, struck_step=self.step, struck_where=where)

    def result(self, *, ended: float, exit_code: int, timed_out: bool, log: str) -> Start:
        """All of it, once the process is gone."""
        fields = {**self._fields, "last_step": self.step}
        return Start(
            **fields,
            ended=ended,
            exit_code=exit_code,
            timed_out=timed_out,
            uris=len(self._uris),
            commits=tuple(self._commits),
            stalls=tuple(self._stalls),
            boundaries=tuple(self._boundaries),
            waits=tuple(self._waits),
            log=log,
        )


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
