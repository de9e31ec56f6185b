"""How a rehearsal looks in a terminal: a bar while it runs, tables at the end."""

import contextlib
import shlex
from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from spotguard._time import format_seconds
from spotguard.rehearse.deliveries import received
from spotguard.rehearse.drawing import kinds, struck
from spotguard.rehearse.plan import Interruption
from spotguard.rehearse.record import Start
from spotguard.rehearse.report import Report

__all__ = ["ConsoleObserver", "print_report", "watching"]

_COLOURS = {"safe": "green", "unsafe": "red", "inconclusive": "yellow"}


class ConsoleObserver:
    """A bar for every start on a terminal; elsewhere a line when each has ended.

    Args:
        console: Where to.
        progress: The bars.
    """

    def __init__(self, console: Console, progress: Progress) -> None:
        self._console, self._progress = console, progress
        self._task = progress.add_task("", visible=False)
        self._title, self._total = "", None

    _total: int | None

    def planned(self, plan: Sequence[Interruption], *, seed: int, total_steps: int) -> None:
        """Show what is going to happen, and how to repeat it."""
        self._total = total_steps
        self._console.print(
            f"seed {seed} ([bold]--seed {seed}[/bold] repeats this plan), {len(plan)} interruptions in {total_steps} steps"
        )

    def started(self, title: str) -> None:
        """A bar of its own."""
        self._title = title
        self._task = self._progress.add_task(escape(title), total=self._total)

    def stepped(self, step: int) -> None:
        """Move the bar; the display itself is drawn a few times a second, by a thread of its own."""
        self._progress.update(self._task, completed=step)

    def ended(self, start: Start) -> None:
        """Stop the bar."""
        self._progress.update(self._task, completed=start.last_step)
        self._progress.stop_task(self._task)
        if not self._console.is_terminal:
            spent = format_seconds(start.ended - start.began)
            befallen = "".join(f", {strike.kind} ({strike.where})" for strike in start.strikes)
            self._console.print(
                f"{self._title}; steps {start.first_step} to {start.last_step} in {spent}{befallen}, exit status {start.exit_code}",
                markup=False,
                soft_wrap=True,
            )


@contextlib.contextmanager
def watching() -> Iterator[ConsoleObserver]:
    """Show on standard error how a rehearsal goes."""
    console = Console(stderr=True, highlight=False)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(24),
        TextColumn("{task.completed:.0f} steps"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield ConsoleObserver(console, progress)


def print_report(report: Report, console: Console | None = None) -> None:
    """Print what was found."""
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console = Console(file=console.file, highlight=False, width=200)
    console.print()
    console.print(_interruptions(report))
    if report.platform is not None:
        console.print(_deliveries(report))
    if report.members:
        console.print(_members(report))
    spent = report.spent
    if report.slow_store is not None:
        console.print(f"writing was made slow: {report.slow_store}", markup=False)
    console.print(
        f"untouched {format_seconds(report.untouched.ended)}, interrupted {format_seconds(report.wall_s)}: "
        f"training {spent.training:.1f} s, lost {spent.lost:.1f} s ({report.lost_steps} steps), restore {spent.restore:.1f} s, "
        f"stall {spent.stall:.1f} s, start-up and exit {spent.startup:.1f} s",
        soft_wrap=True,
    )
    colour = _COLOURS[report.verdict]
    for note in report.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    for reason in report.reasons:
        console.print(f"[{colour}]✕[/{colour}] {escape(reason)}", soft_wrap=True)
    again = f"repeat with --seed {report.seed}; the page is {report.output / 'report.html'}"
    verdict = {
        "safe": "SAFE: the final checkpoints are identical, bit for bit",
        "unsafe": "UNSAFE",
        "inconclusive": "INCONCLUSIVE",
    }[report.verdict]
    console.print(f"[bold {colour}]{verdict}[/bold {colour}] ({escape(shlex.join(report.command))})", soft_wrap=True)
    console.print(again, markup=False, soft_wrap=True)


def _interruptions(report: Report) -> Table:
    table = _table("Starts of the interrupted run")
    for name in ("start", "interruption", "where"):
        table.add_column(name, overflow="fold")
    for name in ("steps", "lost", "restore", "stall", "exit"):
        table.add_column(name, justify="right", no_wrap=True)
    for start in report.interrupted:
        table.add_row(
            str(start.number),
            kinds(start),
            struck(start),
            f"{start.first_step} to {start.last_step}",
            str(start.lost_steps),
            format_seconds(start.restore_s) if start.resumed_from else "",
            format_seconds(sum(start.stalls)),
            str(start.exit_code),
        )
    return table


def _deliveries(report: Report) -> Table:
    table = _table(f"What was delivered: {report.platform}, {format_seconds(report.grace_s or 0.0)}")
    table.add_column("start")
    table.add_column("interruption", overflow="fold")
    table.add_column("after", justify="right", no_wrap=True)
    table.add_column("delivered", overflow="fold")
    for name in ("window used", "trained"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in received(report.interrupted):
        when, what = ("\n".join(column) for column in zip(*row.acts, strict=True)) if row.acts else ("", "")
        table.add_row(str(row.start), escape(row.kind), when, escape(what), row.window, row.trained)
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))


def _members(report: Report) -> Table:
    table = Table(
        title="Final checkpoints, untouched and interrupted", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    table.add_column("part of the state", no_wrap=True)
    table.add_column("identical", no_wrap=True)
    table.add_column("first difference", overflow="fold")
    for member in report.members:
        word = {True: "[green]bit for bit[/green]", False: "[red]no[/red]", None: "[yellow]left out[/yellow]"}[
            member.identical
        ]
        table.add_row(escape(member.name), word, escape(member.difference))
    return table
