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
    platform: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Interrupt as this platform does: aws, gcp, azure, k8s, slurm, sagemaker or torchrun.",
            show_default="single signals",
        ),
    ] = None,
    grace: Annotated[
        str | None,
        typer.Option(
            help="How long the platform leaves, such as 30s. The script is not told.",
            show_default="what it leaves as a rule",
        ),
    ] = None,
    slow_store: Annotated[
        str | None,
        typer.Option(
            metavar="TIME|RATE",
            help="Make writing slow: 2s for every object, or 10MB/s for all.",
            show_default="as fast as it is",
        ),
    ] = None,
    sigterm: Annotated[
        int | None, typer.Option(min=0, help="How many SIGTERMs.", show_default="3, or 0 with --platform")
    ] = None,
    sigkill: Annotated[
        int | None,
        typer.Option(
            min=0, help="How many SIGKILLs; two of three in mid-save.", show_default="3, or 0 with --platform"
        ),
    ] = None,
    every: Annotated[
        int | None,
        typer.Option(min=1, help="Steps between saves in the interrupted run.", show_default="a twelfth of the run"),
    ] = None,
    timeout: Annotated[str, typer.Option(help="Longest time that one start may take.")] = "10m",
    output: Annotated[Path, typer.Option(help="Directory for the page and the logs.")] = Path("rehearsal"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Prove that a script survives interruptions: run it untouched, run it interrupted, compare bit for bit.

    Interrupted it is by SIGTERM and SIGKILL; or, with --platform, by what that platform delivers, when it delivers it.

    Exit status 0 only if that is safe, 1 if it is not, 2 if nothing could be rehearsed.
    """
    from spotguard.rehearse import RehearsalOptions, SlowStore, print_report, rehearse, watching

    previous = signal.signal(signal.SIGTERM, _leave)  # so that the script under rehearsal goes with us
    try:
        options = RehearsalOptions(
            seed=seed,
            platform=platform,
            grace_s=None if grace is None else parse_seconds(grace, argument="--grace"),
            slow_store=None if slow_store is None else SlowStore.parse(slow_store),
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
