"""The two drawings of the page: what every start did over time, and over the steps of the run. Positions only; the template draws.

Horizontal positions are in percent of the width, vertical ones in pixels: the drawing fits any screen, and its text stays legible.
"""

import dataclasses
import math
from collections.abc import Sequence

from spotguard._time import format_seconds
from spotguard.rehearse.record import Start

__all__ = ["KINDS", "Drawing", "kinds", "outcome", "over_steps", "over_time", "struck"]

KINDS = {
    "startup": ("start-up and exit", "interpreter, imports, building the model"),
    "restore": ("restore", "find, verify and read the checkpoint"),
    "training": ("training", "steps that count"),
    "stall": ("stall", "the loop waits for a save"),
    "lost": ("lost work", "steps that had to be done again"),
}
_ROW = 54  # pixels
_TICKS = 6


@dataclasses.dataclass(frozen=True)
class Bar:
    """A stretch; a percentage of the width where it begins, another how long it is."""

    kind: str
    x: float
    width: float
    title: str


@dataclasses.dataclass(frozen=True)
class Mark:
    """A moment: ``"commit"``, or what was delivered: ``"notice"``, ``"sigterm"``, ``"frozen"``, ``"sigkill"``."""

    kind: str
    x: float
    title: str


@dataclasses.dataclass(frozen=True)
class Row:
    """One start."""

    y: int
    name: str
    text: str
    bars: tuple[Bar, ...]
    marks: tuple[Mark, ...]


@dataclasses.dataclass(frozen=True)
class Drawing:
    """Rows over one axis.

    Attributes:
        rows: From top to bottom.
        ticks: Positions and labels along the axis.
        height: Of the rows, in pixels.
        unit: Of the axis.
    """

    rows: tuple[Row, ...]
    ticks: tuple[tuple[float, str], ...]
    height: int
    unit: str


def over_time(starts: Sequence[Start]) -> Drawing:
    """Every start from its beginning to its end, the untouched one first."""
    end = max(start.ended for start in starts)
    rows = []
    for index, start in enumerate(starts):
        bars = [
            Bar(
                part.kind,
                100 * part.begin / end,
                100 * part.seconds / end,
                f"{KINDS[part.kind][0]}: {format_seconds(part.seconds)}",
            )
            for part in start.segments
        ]
        marks = [
            Mark("commit", 100 * at / end, f"checkpoint of step {step} committed at {at:.1f} s")
            for at, step in start.commits
        ]
        marks += [
            Mark(
                done.kind,
                100 * done.at / end,
                f"{done.what} at {done.at:.1f} s{': ' if done.trouble else ''}{done.trouble}",
            )
            for strike in start.strikes
            for done in strike.delivered
        ]
        text = f"{format_seconds(start.ended - start.began)}, {outcome(start)}"
        rows.append(Row(index * _ROW, _name(index), text, tuple(bars), tuple(marks)))
    return Drawing(tuple(rows), _ticks(end), len(rows) * _ROW, "s")


def over_steps(starts: Sequence[Start]) -> Drawing:
    """The steps that every start did, whole."""
    end = max(1, *(start.last_step for start in starts))
    rows = []
    for index, start in enumerate(starts):
        kept = start.last_step - start.lost_steps
        bars = [
            Bar(kind, 100 * low / end, 100 * (high - low) / end, f"{KINDS[kind][0]}: steps {low} to {high}")
            for kind, low, high in (
                ("training", start.first_step, max(start.first_step, kept)),
                ("lost", max(start.first_step, kept), start.last_step),
            )
            if high > low
        ]
        marks = [Mark("commit", 100 * step / end, f"checkpoint of step {step}") for _, step in start.commits]
        marks += [
            Mark(
                strike.delivered[0].kind if strike.delivered else "notice",
                100 * strike.step / end,
                f"{strike.kind} ({strike.where}), step {strike.step}",
            )
            for strike in start.strikes
        ]
        text = f"{start.first_step} to {start.last_step}" + (f", {start.lost_steps} lost" if start.lost_steps else "")
        rows.append(Row(index * _ROW, _name(index), text, tuple(bars), tuple(marks)))
    return Drawing(tuple(rows), _ticks(end, whole=True), len(rows) * _ROW, "steps")


def outcome(start: Start) -> str:
    """How a start ended, in a few words."""
    if start.timed_out:
        return "timed out"
    if start.strike is not None and not (start.finished and start.strike.interruption.goes_on):
        return f"{start.strike.kind} at step {start.strike.step}"
    return "finished" if start.finished else "ended early"


def kinds(start: Start) -> str:
    """What has befallen a start, in the words of the plan."""
    return "; ".join(strike.kind for strike in start.strikes)


def struck(start: Start) -> str:
    """Where that was; or how the start ended, if nothing has."""
    return "; ".join(f"{strike.where}, step {strike.step}" for strike in start.strikes) or outcome(start)


def _name(index: int) -> str:
    return f"start {index}" if index else "untouched"


def _ticks(end: float, *, whole: bool = False) -> tuple[tuple[float, str], ...]:
    """Round numbers along the axis, with their positions in percent."""
    rough = max(end / _TICKS, 1.0 if whole else 0.0)
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    return tuple((100 * index * step / end, f"{index * step:g}") for index in range(int(end / step) + 1))
