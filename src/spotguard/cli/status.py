"""``spotguard status URI``: how the run stands, where an exit status does not tell."""

import dataclasses
import datetime as dt
from typing import Annotated, Any

import typer

from spotguard.cli.opening import existing_run
from spotguard.cli.output import age, table, to_json
from spotguard.ops.run_status import read_status
from spotguard.pipeline.checkpoint_store import CheckpointStore
from spotguard.pipeline.history import read_history

__all__ = ["status_command"]


def status_command(
    uri: Annotated[
        str, typer.Argument(help="The run: a directory, or a URI such as s3://bucket/run-17.", show_default=False)
    ],
    finished: Annotated[
        bool, typer.Option("--finished", help="Exit status 0 if the run is finished, else 1: for loops in a shell.")
    ] = False,
    word: Annotated[
        bool, typer.Option("--word", help="Print one word only: finished, preempted, failed or unknown.")
    ] = False,
    attempt: Annotated[
        bool,
        typer.Option("--attempt", help="Print the number of the newest attempt only, 0 before the first: for --after."),
    ] = False,
    after: Annotated[
        int | None,
        typer.Option(
            min=0, help="Ask about a start after this attempt. If there is none, it has failed.", show_default=False
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Say how the newest attempt ended: finished, preempted, failed; or that it runs, or was killed without a word."""
    if attempt:  # of a run that need not be there yet
        return print(read_history(CheckpointStore(uri).objects).newest_attempt)  # noqa: T201
    store = existing_run(uri)
    status = read_status(store.objects, after=after)
    if word:
        print(status.state)  # noqa: T201
    elif as_json:
        print(to_json({name: _plain(value) for name, value in dataclasses.asdict(status).items()}))  # noqa: T201
    else:
        ended = status.state in ("preempted", "failed") or status.exit_code is not None
        about = {
            "state": status.state if status.state != "unknown" else "",
            "which is": status.says,
            "attempt": str(status.attempt),
            "step": "" if status.step is None else str(status.step),
            "checkpoint": status.checkpoint or "none",
            "committed": f"{age(status.committed_at)} ago" if status.committed_at is not None else "",
            "notice": status.notice or "",
            "detail": status.detail,
            "exit status": "" if status.exit_code is None else str(status.exit_code),
            "host": status.host,
            "ended" if ended else "started": status.at.isoformat(timespec="seconds") if status.at is not None else "",
        }
        table(store.uri, ("field", "value"), [row for row in about.items() if row[1]])
    if finished and status.state != "finished":
        raise typer.Exit(1)
    return None


def _plain(value: Any) -> Any:
    return value.isoformat() if isinstance(value, dt.datetime) else value
