"""How a run stands, told from its claims, its manifests and the exit record: never by time of modification."""

import dataclasses
import datetime as dt
from typing import Literal

from spotguard.checkpoint import CheckpointId, Claim, ExitRecord, Manifest
from spotguard.checkpoint.layout import EXIT
from spotguard.errors import CheckpointDamagedError, CheckpointError, ObjectNotFoundError
from spotguard.pipeline.history import History, read_history
from spotguard.pipeline.objects import read_record
from spotguard.stores import ObjectStore

__all__ = ["RunStatus", "State", "read_status"]

State = Literal["finished", "preempted", "failed", "unknown"]


@dataclasses.dataclass(frozen=True)
class RunStatus:
    """How the newest attempt stands.

    Attributes:
        state: As in the exit record of the newest attempt; ``"unknown"`` where that attempt has left none.
        says: The same, for people.
        attempt: The newest one.
        step: Step boundaries passed when it ended; of the newest checkpoint where that is not known.
        checkpoint: The newest one that the next start would resume from.
        committed_at: When that was written, wall-clock time.
        notice: What stopped it.
        detail: Why the last checkpoint is not newer, what failed, or what is wrong with the records.
        exit_code: Exit status that was chosen.
        host: Where it ran.
        at: When it ended; when it began, where it has not said that it ended.
    """

    state: State
    says: str
    attempt: int
    step: int | None = None
    checkpoint: str | None = None
    committed_at: dt.datetime | None = None
    notice: str | None = None
    detail: str = ""
    exit_code: int | None = None
    host: str = ""
    at: dt.datetime | None = None


def read_status(store: ObjectStore, *, after: int | None = None) -> RunStatus:
    """Read how a run stands; a damaged record is part of the answer.

    Args:
        store: The run.
        after: Ask about a start that came after this attempt. One that ended before it had claimed an attempt has left nothing, and what
            the attempt before it has left says nothing of it.

    Raises:
        StoreError: It cannot be read.
        FormatTooNewError: A later release has written it.
    """
    history = read_history(store)
    newest = history.lineage[0] if history.lineage else None
    manifest, trouble = _newest_manifest(store, newest)
    record = None
    try:
        record = read_record(store, EXIT, lambda data: ExitRecord.from_bytes(data, key=f"{store.uri}/{EXIT}"))
    except ObjectNotFoundError:
        pass
    except CheckpointDamagedError as error:
        trouble = [str(error), *trouble]
    attempt = history.newest_attempt
    written = manifest.created_at if manifest is not None else None
    if after is not None and attempt <= after:
        return RunStatus(
            state="failed",
            says=f"nothing has been started since attempt {after}: it failed before it had the run",
            attempt=attempt,
            step=newest.step if newest is not None else None,
            checkpoint=str(newest) if newest is not None else None,
            committed_at=written,
            detail="; ".join(trouble),
        )
    if record is not None and record.attempt >= attempt:
        return RunStatus(
            state=record.state,
            says=_SAYS[record.state],
            attempt=record.attempt,
            step=newest.step if newest is not None and record.checkpoint is None else record.step,
            checkpoint=str(newest) if newest is not None and record.checkpoint is None else record.checkpoint,
            committed_at=written if newest is not None and record.checkpoint == str(newest) else None,
            notice=record.notice,
            detail="; ".join([record.detail, *trouble] if record.detail else trouble),
            exit_code=record.exit_code,
            host=record.host,
            at=record.at,
        )
    claim = history.claims.get(attempt)
    state, says = _without_record(history, claim, manifest)
    known = claim is not None and attempt not in history.damaged
    return RunStatus(
        state=state,
        says=says,
        attempt=attempt,
        step=newest.step if newest is not None else None,
        checkpoint=str(newest) if newest is not None else None,
        committed_at=written,
        detail="; ".join(trouble),
        host=claim.host if claim is not None and known else "",
        at=claim.created_at if claim is not None and known else None,
    )


_SAYS: dict[State, str] = {
    "finished": "finished; there is no work left",
    "preempted": "stopped by a notice; start it again",
    "failed": "an exception ended it; a restart may not mend that",
}


def _without_record(history: History, claim: Claim | None, manifest: Manifest | None) -> tuple[State, str]:
    """What the newest attempt is, which has not said how it ended."""
    attempt = history.newest_attempt
    if attempt in history.damaged:
        return "unknown", f"not known: {history.damaged[attempt]}"
    if claim is not None and claim.reason == "rollback":
        return "unknown", "rolled back, and not started since"
    if manifest is not None and manifest.attempt == attempt and manifest.finished:
        return (
            "finished",
            "finished; it was killed after its last commit",
        )  # which is made when the loop has come to its end
    return "unknown", "running, or killed without a word"


def _newest_manifest(store: ObjectStore, newest: CheckpointId | None) -> tuple[Manifest | None, list[str]]:
    if newest is None:
        return None, []
    where = f"{store.uri}/{newest.manifest_key}"
    try:
        return read_record(store, newest.manifest_key, lambda data: Manifest.from_bytes(data, key=where)), []
    except (CheckpointError, ObjectNotFoundError) as error:  # an older one may be whole: 'resolve' tells
        return None, [str(error)]
