"""``spotguard rehearse [OPTIONS] -- COMMAND...``."""

import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from spotguard._time import parse_seconds
from spotguard.cli.output import fail
from spotguard.errors import ConfigError

__all__ = ["rehearse_command"]


def rehearse_command(
    command: Annotated[list[str], typer.Argument(help="How you start the script, after '--'.", show_default=False)],
    seed: Annotated[
        int | None,
        typer.Option(help="Repeat the interruptions of an earlier rehearsal.", show_default="random, printed"),
    ] = None,
    sigterm: Annotated[int, typer.Option(min=0, help="How many SIGTERMs.")] = 3,
    sigkill: Annotated[int, typer.Option(min=0, help="How many SIGKILLs; two of three in mid-save.")] = 3,
    every: Annotated[
        int | None,
        typer.Option(min=1, help="Steps between saves in the interrupted run.", show_default="a twelfth of the run"),
    ] = None,
    timeout: Annotated[str, typer.Option(help="Longest time that one start may take.")] = "10m",
    output: Annotated[Path, typer.Option(help="Directory for the page and the logs.")] = Path("rehearsal"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Prove that a script survives interruptions: run it untouched, run it under SIGTERM and SIGKILL, compare bit for bit.

    Exit status 0 only if that is safe, 1 if it is not, 2 if nothing could be rehearsed.
    """
    from spotguard.rehearse import RehearsalOptions, print_report, rehearse, watching

    previous = signal.signal(signal.SIGTERM, _leave)  # so that the script under rehearsal goes with us
    try:
        options = RehearsalOptions(
            seed=seed,
            sigterm=sigterm,
            sigkill=sigkill,
            every=every,
            timeout=parse_seconds(timeout, argument="--timeout"),
            output=output,
        )
        with watching() as observer:
            report = rehearse(command, options, observer)
    except ConfigError as error:
        fail(str(error))
        raise typer.Exit(2) from error
    finally:
        signal.signal(signal.SIGTERM, previous)
    if as_json:
        typer.echo(report.to_json())
    else:
        print_report(report)
    raise typer.Exit(0 if report.safe else 1)


def _leave(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the signature of a handler
    sys.exit(128 + number)
