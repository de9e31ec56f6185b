"""The page: one HTML file with its style and its drawing inside, which opens without a network."""

import dataclasses
import shlex
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from spotguard._time import format_seconds, utc_now
from spotguard.rehearse.drawing import KINDS, outcome, over_steps, over_time
from spotguard.rehearse.record import Spent
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
        outcome=outcome,
    )


def _headline(report: Report) -> str:
    if report.verdict == "safe":
        return f"{len(report.interruptions)} interruptions later, the same state bit for bit"
    return {"unsafe": "Not safe to interrupt", "inconclusive": "Nothing can be said yet"}[report.verdict]


def _options(report: Report) -> list[str]:
    kinds = [item.kind for item in report.plan]
    counts = ["--sigterm", str(kinds.count("SIGTERM")), "--sigkill", str(kinds.count("SIGKILL"))]
    return ["--seed", str(report.seed), *counts, "--every", str(report.every)]


def _shares(untouched: Spent, interrupted: Spent) -> list[tuple[str, str, float, float, float]]:
    """Kind, its name, seconds in either run, and its share of the interrupted one in percent."""
    ours, theirs = dataclasses.asdict(untouched), dataclasses.asdict(interrupted)
    total = sum(theirs.values()) or 1.0
    order = ("training", "lost", "stall", "restore", "startup")
    return [(kind, KINDS[kind][0], ours[kind], theirs[kind], 100 * theirs[kind] / total) for kind in order]
