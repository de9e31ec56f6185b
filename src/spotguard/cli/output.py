"""How the commands print."""

import contextlib
import datetime as dt
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table

from spotguard._time import format_seconds, utc_now

__all__ = ["age", "bar", "fail", "note", "size", "table", "to_json"]


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; on a terminal it fits the width, in a pipe nothing is cut."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=100_000)
    grid = Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        grid.add_column(column, overflow="fold", no_wrap=index == 0)
    for row in rows:
        grid.add_row(*(escape(cell) for cell in row))
    console.print(grid)


def to_json(value: Any) -> str:
    """JSON for programs."""
    return json.dumps(value, indent=2, default=str)


def fail(text: str) -> None:
    """Say on standard error what went wrong."""
    Console(stderr=True, soft_wrap=True).print(f"[red]spotguard:[/red] {escape(text)}")


def note(text: str) -> None:
    """Say something beside the result, on standard error."""
    Console(stderr=True, soft_wrap=True).print(escape(text))


def size(count: int) -> str:
    """Bytes in the unit a person would use.

    Example:
        >>> size(1_240_000), size(12)
        ('1.2 MB', '12 B')
    """
    value, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"


def age(when: dt.datetime) -> str:
    """How long ago."""
    return format_seconds(max(0.0, (utc_now() - when).total_seconds()))


@contextlib.contextmanager
def bar(title: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error, on a terminal only; counts bytes, up to the total where it is known."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=total)
        yield lambda count: progress.advance(task, count)
