"""``spotguard doctor [URI]``."""

import dataclasses
from typing import Annotated

import typer

from spotguard.cli.output import table, to_json

__all__ = ["doctor_command"]


def doctor_command(
    uri: Annotated[
        str | None,
        typer.Argument(
            help="Where the run is kept, or will be: it is tried out, and left as it was.", show_default=False
        ),
    ] = None,
    grace: Annotated[
        str | None, typer.Option(help="What the script says with grace=, such as 30s.", show_default=False)
    ] = None,
    pid: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Look at this training, which runs already; by default at that of URI, if it runs here.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Look for what could keep a notice from being heard, or a save from being made in time. Exit status 1 if there is a problem.

    Run it where the training runs: in the same container, started in the same way.
    """
    from spotguard.ops.doctor import examine

    findings = examine(uri, grace=grace, pid=pid)
    problems = sum(finding.level == "problem" for finding in findings)
    if as_json:
        print(to_json({"problems": problems, "findings": [dataclasses.asdict(item) for item in findings]}))  # noqa: T201
    else:
        rows = [(finding.level, finding.check, finding.what, finding.fix) for finding in findings]
        table("spotguard doctor", ("level", "looked at", "found", "to do"), rows)
    if problems:
        raise typer.Exit(1)
