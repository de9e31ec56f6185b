"""The page: one HTML file with its style and its drawing inside, which opens without a network."""

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from spotguard._time import format_seconds, utc_now
from spotguard.rehearse.deliveries import received
from spotguard.rehearse.drawing import KINDS, kinds, over_steps, over_time, struck
from spotguard.rehearse.record import Spent, Start
from spotguard.rehearse.report import Report

__all__ = ["render_page", "write_page"]


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
    return environment.get_template("page.html.j2").render(
        report=report,
        command=shlex.join(report.command),
        repeat=shlex.join(["spotguard", "rehearse", *_options(report), "--", *report.command]),
        created=f"{utc_now():%Y-%m-%d %H:%M} UTC",
        headline=_headline(report),
        kinds=KINDS,
        over_time=over_time(starts),
        over_steps=over_steps(starts),
        shares=_shares(report.untouched.spent, report.spent),
        starts=report.interrupted,
        befallen=kinds,
        struck=struck,
        received=received(report.interrupted) if report.platform is not None else (),
        marks=_marks(starts),
    )


def _headline(report: Report) -> str:
    if report.verdict == "safe":
        return f"{len(report.interruptions)} interruptions later, the same state bit for bit"
    return {"unsafe": "Not safe to interrupt", "inconclusive": "Nothing can be said yet"}[report.verdict]


def _options(report: Report) -> list[str]:
    options = ["--seed", str(report.seed)]
    if report.platform is not None:
        options += ["--platform", report.platform, "--grace", f"{report.grace_s:g}s"]
    single = [item.kind for item in report.plan if item.scenario is None]
    if single or report.platform is None:
        options += ["--sigterm", str(single.count("SIGTERM")), "--sigkill", str(single.count("SIGKILL"))]
    if report.slow_store is not None:
        options += ["--slow-store", report.slow_store.text]
    return [*options, "--every", str(report.every)]


def _marks(starts: Sequence[Start]) -> list[tuple[str, str]]:
    """What the marks in the drawings mean, those that are there."""
    seen = {done.kind for start in starts for strike in start.strikes for done in strike.delivered}
    named = [("notice", "metadata service"), ("sigterm", "signal"), ("frozen", "frozen"), ("sigkill", "SIGKILL")]
    if not any(strike.interruption.scenario for start in starts for strike in start.strikes):
        named[1] = ("sigterm", "SIGTERM")
    return [one for one in named if one[0] in seen] + [("commit", "checkpoint committed")]


def _shares(untouched: Spent, interrupted: Spent) -> list[tuple[str, str, float, float, float]]:
    """Kind, its name, seconds in either run, and its share of the interrupted one in percent."""
    ours, theirs = dataclasses.asdict(untouched), dataclasses.asdict(interrupted)
    total = sum(theirs.values()) or 1.0
    order = ("training", "lost", "stall", "restore", "startup")
    return [(kind, KINDS[kind][0], ours[kind], theirs[kind], 100 * theirs[kind] / total) for kind in order]
