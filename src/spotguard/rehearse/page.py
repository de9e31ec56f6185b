"""The page: one HTML file with its style and its drawing inside, which opens without a network."""

import dataclasses
import math
import shlex
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from spotguard._time import format_seconds, utc_now
from spotguard.rehearse.record import Spent, Start
from spotguard.rehearse.report import Report

__all__ = ["render_page", "write_page"]

_KINDS = {
    "startup": ("start-up and exit", "interpreter, imports, building the model"),
    "restore": ("restore", "find, verify and read the checkpoint"),
    "training": ("training", "steps that count"),
    "stall": ("stall", "the loop waits for a save"),
    "lost": ("lost work", "steps that had to be done again"),
}
_TICKS = 6


@dataclasses.dataclass(frozen=True)
class _Bar:
    kind: str
    x: float  # percent of the width of the drawing, as all positions
    width: float
    title: str


@dataclasses.dataclass(frozen=True)
class _Mark:
    kind: str
    x: float
    title: str


@dataclasses.dataclass(frozen=True)
class _Row:
    y: int  # pixels
    name: str
    text: str
    bars: tuple[_Bar, ...]
    marks: tuple[_Mark, ...]


def write_page(report: Report, path: Path) -> None:
    """Write the page."""
    path.write_text(render_page(report), encoding="utf-8")


def render_page(report: Report) -> str:
    """The page as HTML."""
    environment = Environment(
        loader=PackageLoader("spotguard.rehearse", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["seconds"] = format_seconds
    starts = [report.untouched, *report.interrupted]
    end = max(start.ended for start in starts)
    rows = [_row(start, end, index * 54, untouched=index == 0) for index, start in enumerate(starts)]
    return environment.get_template("page.html.j2").render(
        report=report,
        command=shlex.join(report.command),
        repeat=shlex.join(["spotguard", "rehearse", *_options(report), "--", *report.command]),
        created=f"{utc_now():%Y-%m-%d %H:%M} UTC",
        headline=_headline(report),
        kinds=_KINDS,
        rows=rows,
        height=len(rows) * 54,
        ticks=_ticks(end),
        shares=_shares(report.untouched.spent, report.spent),
        starts=report.interrupted,
        outcome=outcome,
    )


def outcome(start: Start) -> str:
    """How a start ended, in two words or three."""
    if start.timed_out:
        return "timed out"
    if start.interruption is not None:
        return f"{start.interruption.kind} at step {start.struck_step}"
    return "finished" if start.finished else "ended early"


def _headline(report: Report) -> str:
    if report.verdict == "safe":
        return f"{len(report.interruptions)} interruptions later, the same state bit for bit"
    return {"unsafe": "Not safe to interrupt", "inconclusive": "Nothing can be said yet"}[report.verdict]


def _options(report: Report) -> list[str]:
    kinds = [item.kind for item in report.plan]
    counts = ["--sigterm", str(kinds.count("SIGTERM")), "--sigkill", str(kinds.count("SIGKILL"))]
    return ["--seed", str(report.seed), *counts, "--every", str(report.every)]


def _row(start: Start, end: float, y: int, *, untouched: bool) -> _Row:
    bars = tuple(
        _Bar(
            segment.kind,
            100 * segment.begin / end,
            100 * segment.seconds / end,
            f"{_KINDS[segment.kind][0]}: {format_seconds(segment.seconds)}",
        )
        for segment in start.segments
    )
    marks = [_Mark("commit", 100 * at / end, f"checkpoint committed at {at:.1f} s") for at in start.commits]
    if start.interruption is not None and start.struck_at is not None:
        title = f"{start.interruption.kind} {start.struck_where}, step {start.struck_step}"
        marks.append(_Mark(start.interruption.kind.lower(), 100 * start.struck_at / end, title))
    origin = "from zero" if start.resumed_from is None else f"from step {start.first_step}"
    text = f"{origin} to {start.last_step}" + (f", {start.lost_steps} lost" if start.lost_steps else "")
    return _Row(
        y, "untouched" if untouched else f"start {start.number}", f"{text} · {outcome(start)}", bars, tuple(marks)
    )


def _ticks(end: float) -> list[tuple[float, str]]:
    """Round numbers of seconds along the axis, with their positions in percent."""
    rough = end / _TICKS
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    count = int(end / step)
    return [(100 * index * step / end, f"{index * step:g}") for index in range(count + 1)]


def _shares(untouched: Spent, interrupted: Spent) -> list[tuple[str, str, float, float, float]]:
    """Kind, its name, seconds in either run, and its share of the interrupted one in percent."""
    ours, theirs = dataclasses.asdict(untouched), dataclasses.asdict(interrupted)
    total = sum(theirs.values()) or 1.0
    order = ("training", "lost", "stall", "restore", "startup")
    return [(kind, _KINDS[kind][0], ours[kind], theirs[kind], 100 * theirs[kind] / total) for kind in order]
