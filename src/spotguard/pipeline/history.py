"""Which checkpoints belong to the run as it went, newest first: by claims and their parents, never by time of modification."""

import dataclasses
import os
import socket
import time
import uuid
from collections.abc import Iterable, Mapping

import spotguard
from spotguard._time import utc_now
from spotguard.checkpoint import CheckpointId, Claim, RunRecord
from spotguard.checkpoint.layout import ATTEMPTS, MANIFESTS, RUN, claim_key, parse_claim_key, parse_manifest_key
from spotguard.errors import (
    CheckpointDamagedError,
    NoUsableCheckpointError,
    ObjectExistsError,
    ObjectNotFoundError,
    StoreError,
)
from spotguard.pipeline.objects import read_object, retried, write_object
from spotguard.stores import ObjectStore

__all__ = ["History", "claim_attempt", "lineage", "open_run", "read_history"]

# How often, and how far apart, a start looks for the run record that another one is creating.
_PATIENCE, _PAUSE_S = 20, 0.05


@dataclasses.dataclass(frozen=True)
class History:
    """What a listing of a run tells: who started, and what was committed.

    Attributes:
        claims: By attempt. One that cannot be read stands here without a parent.
        manifests: Ids of all committed checkpoints, in order.
        damaged: Attempts whose claim is damaged or gone, and what is wrong with it.
    """

    claims: Mapping[int, Claim]
    manifests: tuple[CheckpointId, ...]
    damaged: Mapping[int, str] = dataclasses.field(default_factory=dict)

    @property
    def newest_attempt(self) -> int:
        """The latest claim; 0 in a run that nobody has started."""
        return max(self.claims, default=0)

    @property
    def lineage(self) -> list[CheckpointId]:
        """Checkpoints of the history that the next start continues, newest first."""
        return lineage(self.claims, self.manifests)


def lineage(claims: Mapping[int, Claim], manifests: Iterable[CheckpointId]) -> list[CheckpointId]:
    """Follow the newest claim to its parents, each bounded by the step up to which its child took it over.

    Pure. A checkpoint that a zombie of an older attempt commits late lies beyond that bound and is never found.

    Args:
        claims: By attempt.
        manifests: Ids of all committed checkpoints.

    Returns:
        Ids, newest first.
    """
    by_attempt: dict[int, list[CheckpointId]] = {}
    for identity in manifests:
        by_attempt.setdefault(identity.attempt, []).append(identity)
    found: list[CheckpointId] = []
    attempt: int | None = max(claims, default=None)
    bound = float("inf")
    while attempt is not None:
        found += sorted((item for item in by_attempt.get(attempt, []) if item.step <= bound), reverse=True)
        claim = claims.get(attempt)
        if claim is None or claim.parent is None or claim.parent >= attempt:
            break
        bound = min(bound, float("inf") if claim.parent_max_step is None else claim.parent_max_step)
        attempt = claim.parent
    return found


def read_history(store: ObjectStore) -> History:
    """List claims and manifests. Keys that are not ours are passed over.

    Raises:
        FormatTooNewError: A later release has claimed an attempt.
    """
    claims: dict[int, Claim] = {}
    damaged: dict[int, str] = {}
    for info in retried(lambda: list(store.list(ATTEMPTS))):
        if (attempt := parse_claim_key(info.key)) is not None:
            try:
                claims[attempt] = Claim.from_bytes(read_object(store, info.key), key=f"{store.uri}/{info.key}")
            except CheckpointDamagedError as error:
                damaged[attempt] = str(error)
    keys = [parse_manifest_key(info.key) for info in retried(lambda: list(store.list(MANIFESTS)))]
    manifests = tuple(sorted(identity for identity in keys if identity is not None))
    for attempt in {identity.attempt for identity in manifests} - set(claims) - set(damaged):
        damaged[attempt] = f"{store.uri}/{claim_key(attempt)} is missing, but there are checkpoints of that attempt"
    for claim in list(claims.values()):
        if claim.parent is not None and claim.parent not in claims:
            where = f"{store.uri}/{claim_key(claim.parent)}"
            damaged.setdefault(claim.parent, f"{where} is missing, but attempt {claim.attempt} continues it")
    for attempt in damaged:
        claims[attempt] = Claim(attempt=attempt, created_at=utc_now(), reason="unreadable")
    return History(claims, manifests, damaged)


def open_run(store: ObjectStore) -> RunRecord:
    """Read the identity of the run, or give it one.

    Raises:
        StoreError: There are checkpoints, and the record that says whose they are is gone.
    """
    for tries in range(2 * _PATIENCE):
        try:
            return RunRecord.from_bytes(read_object(store, RUN), key=f"{store.uri}/{RUN}")
        except ObjectNotFoundError:
            record = RunRecord(run_id=uuid.uuid4().hex, created_at=utc_now(), spotguard=spotguard.__version__)
        keys = [info.key for info in retried(lambda: list(store.list(MANIFESTS)))]
        if ours := next((key for key in keys if parse_manifest_key(key)), None):
            raise StoreError(
                f"{store.uri} holds checkpoints ({ours}) but no {RUN}: it was copied or deleted in part. "
                f"Bring {RUN} back, or choose another directory"
            )
        try:
            write_object(store, RUN, record.to_bytes(), exclusive=True)
        except (ObjectExistsError, ObjectNotFoundError):
            # Another start came first: its record counts. If none appears, it died between taking the name and giving it content
            # (on a mount without hard links). What it left is removed, and with it its means to come back.
            if tries >= 1:
                time.sleep(_PAUSE_S)
            if tries == _PATIENCE:
                store.discard_partials(lambda key: key == RUN)
            continue
        return record
    raise StoreError(f"{store.uri}/{RUN} can be neither read nor created")


def claim_attempt(store: ObjectStore, *, rollback_to: CheckpointId | None = None) -> Claim:
    """Take the next attempt number; from here on every older attempt is fenced off.

    Args:
        store: The run.
        rollback_to: Continue from this checkpoint instead of the newest.

    Returns:
        The claim as written.

    Raises:
        NoUsableCheckpointError: Claims are damaged, and without them no checkpoint is known to be of this history.
    """
    skip, mine = 0, set[int]()
    while True:
        history = read_history(store)
        newest, before = history.newest_attempt, _without(history, mine)
        line = before.lineage
        if rollback_to is not None:
            parent, bound, reason = rollback_to.attempt, rollback_to.step, "rollback"
        elif not line and history.damaged:
            # A claim made now would say that there was nothing to continue, for good, even if the damaged ones are brought back.
            raise NoUsableCheckpointError(
                "it is not known which checkpoints belong to this run:\n  "
                + "\n  ".join(history.damaged.values())
                + "\n"
                "Bring the claims back, 'spotguard rollback' to a whole checkpoint, or start a new run under another URI"
            )
        else:
            parent, bound, reason = before.newest_attempt, line[0].step if line else 0, "start"
        claim = Claim(
            attempt=newest + 1 + skip,
            parent=parent or None,
            parent_max_step=bound if parent else None,
            reason=reason,
            host=socket.gethostname(),
            pid=os.getpid(),
            created_at=utc_now(),
        )
        try:
            write_object(store, claim_key(claim.attempt), claim.to_bytes(), exclusive=True)
        except ObjectExistsError:
            # Somebody was faster, or died between taking the name and giving it content; in the latter case go on to the next number.
            skip = skip + 1 if read_history(store).newest_attempt == newest else 0
            continue
        # A process that is about to be fenced off may have committed between our listing and our claim, and swept away what we are about
        # to resume from. From here on no commit of it can go unseen by its own sweep, so one more look is enough.
        mine.add(claim.attempt)
        after = read_history(store)
        if (
            rollback_to is None
            and after.newest_attempt == claim.attempt
            and _without(after, mine).lineage[:1] != line[:1]
        ):
            skip = 0
            continue
        return claim


def _without(history: History, attempts: set[int]) -> History:
    """The history as it would be had these attempts never been claimed."""
    claims = {attempt: claim for attempt, claim in history.claims.items() if attempt not in attempts}
    return dataclasses.replace(history, claims=claims)
