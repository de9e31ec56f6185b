"""Which checkpoints belong to the run as it went, newest first: by claims and their parents, never by time of modification."""

import dataclasses
import os
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence

from spotguard._time import utc_now
from spotguard.checkpoint import CheckpointId, Claim
from spotguard.checkpoint.layout import ATTEMPTS, MANIFESTS, claim_key, parse_claim_key, parse_manifest_key
from spotguard.errors import CheckpointDamagedError, NoUsableCheckpointError, ObjectExistsError, ObjectNotFoundError
from spotguard.pipeline.identity import open_run
from spotguard.pipeline.objects import create_object, read_record, retried, together
from spotguard.stores import ObjectRef, ObjectStore

__all__ = [
    "History",
    "claim_and_look",
    "claim_attempt",
    "lineage",
    "list_claims",
    "merge_histories",
    "open_run",
    "read_history",
    "take_attempt",
]


@dataclasses.dataclass(frozen=True)
class History:
    """What a listing of a run tells: who started, and what was committed.

    Attributes:
        claims: By attempt. One that cannot be read stands here without a parent.
        manifests: Ids of all committed checkpoints, in order.
        damaged: Attempts whose claim is damaged or gone, and what is wrong with it.
        refs: What to delete so that a checkpoint is none any more.
    """

    claims: Mapping[int, Claim]
    manifests: tuple[CheckpointId, ...]
    damaged: Mapping[int, str] = dataclasses.field(default_factory=dict)
    refs: Mapping[CheckpointId, ObjectRef] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def intact(self) -> dict[int, Claim]:
        """The claims that could be read."""
        return {attempt: claim for attempt, claim in self.claims.items() if attempt not in self.damaged}

    @property
    def newest_attempt(self) -> int:
        """The latest claim; 0 in a run that nobody has started."""
        return max(self.claims, default=0)

    @property
    def tip(self) -> int:
        """The attempt whose history the next start continues: the newest that has committed anything, else the newest; 0 in a new run.

        An attempt that has committed nothing has nothing to lose, and what it recorded about its parent may be out of date: a commit can
        come between its last look and its claim, and it can be killed before it looks again. So the next start passes it over and looks
        for itself. An attempt that a later one continues has committed, though perhaps to another tier.
        """
        committed = {identity.attempt for identity in self.manifests}
        continued = {claim.parent for claim in self.intact.values() if claim.parent is not None}
        return max(committed | continued, default=self.newest_attempt)

    @property
    def undecided(self) -> int | None:
        """A rollback that has claimed and not committed: it is under way, or was killed. A claim that cannot be read may be one."""
        return max((at for at, claim in self.claims.items() if at > self.tip and claim.reason != "start"), default=None)

    @property
    def lineage(self) -> list[CheckpointId]:
        """Checkpoints of the history that the next start continues, newest first."""
        return lineage(self.claims, self.manifests, self.tip)


def lineage(claims: Mapping[int, Claim], manifests: Iterable[CheckpointId], tip: int) -> list[CheckpointId]:
    """Follow a claim to its parents, each bounded by the checkpoint at which its child took it over.

    Pure. A checkpoint that a zombie of an older attempt commits late lies beyond that bound and is never found. The bound is a step for
    everything older, and a sequence for the parent alone: each attempt counts its own.

    Args:
        claims: By attempt.
        manifests: Ids of all committed checkpoints.
        tip: The attempt to begin with.

    Returns:
        Ids, newest first.
    """
    by_attempt: dict[int, list[CheckpointId]] = {}
    for identity in manifests:
        by_attempt.setdefault(identity.attempt, []).append(identity)
    found: list[CheckpointId] = []
    attempt, step, sequence = tip, float("inf"), float("inf")
    while True:
        own = by_attempt.get(attempt, [])
        found += sorted((item for item in own if (item.step, item.sequence) <= (step, sequence)), reverse=True)
        claim = claims.get(attempt)
        if claim is None or claim.parent is None or claim.parent >= attempt:
            return found
        attempt, sequence = claim.parent, float("inf")
        if claim.parent_max_step is not None and claim.parent_max_step <= step:
            step = claim.parent_max_step
            sequence = sequence if claim.parent_max_sequence is None else claim.parent_max_sequence


def list_claims(store: ObjectStore) -> list[int]:
    """The attempts that are claimed. Keys that are not ours are passed over."""
    found = [parse_claim_key(info.key) for info in retried(lambda: list(store.list(ATTEMPTS)))]
    return [attempt for attempt in found if attempt is not None]


def read_history(store: ObjectStore, *, known: History | None = None) -> History:
    """List claims and manifests. Keys that are not ours are passed over.

    Args:
        store: The run.
        known: An earlier listing of the same store: claims never change, so those that were intact in it are not read again.

    Raises:
        FormatTooNewError: A later release has claimed an attempt.
    """

    def read(attempt: int) -> Claim | str:
        key = claim_key(attempt)
        try:
            return read_record(store, key, lambda data: Claim.from_bytes(data, key=f"{store.uri}/{key}"))
        except CheckpointDamagedError as error:
            return str(error)
        except ObjectNotFoundError:
            if attempt in listed:
                return f"{store.uri}/{key} was there a moment ago and is gone: is the run being moved or deleted?"
            return f"{store.uri}/{key} is missing, but there are checkpoints of that attempt"

    def read_all(attempts: Sequence[int]) -> None:
        for attempt, answer in zip(attempts, together(read, attempts), strict=True):
            if isinstance(answer, Claim):
                claims[attempt] = answer
            else:
                damaged[attempt] = answer

    listed = list_claims(store)
    old = known.intact if known is not None else {}
    claims = {attempt: old[attempt] for attempt in listed if attempt in old}
    damaged: dict[int, str] = {}
    read_all([attempt for attempt in listed if attempt not in old])
    infos = retried(lambda: list(store.list(MANIFESTS)))
    refs = {identity: info.ref for info in infos if (identity := parse_manifest_key(info.key)) is not None}
    manifests = tuple(sorted(refs))
    # Somebody has claimed and committed between the two listings, or the claim is gone.
    read_all(sorted({identity.attempt for identity in manifests} - set(listed)))
    for claim in list(claims.values()):
        if claim.parent is not None and claim.parent not in claims:
            where = f"{store.uri}/{claim_key(claim.parent)}"
            damaged.setdefault(claim.parent, f"{where} is missing, but attempt {claim.attempt} continues it")
    return History(claims | _unreadable(damaged), manifests, damaged, refs)


def merge_histories(histories: Sequence[History]) -> History:
    """What several stores of one run tell together: a claim is damaged only where none of them has it intact.

    Args:
        histories: One for each store. Of two claims to one number, which only starts that do not see the same stores can make, the first
            counts.
    """
    claims: dict[int, Claim] = {}
    damaged: dict[int, str] = {}
    for history in histories:
        claims = history.intact | claims
        damaged = dict(history.damaged) | damaged
    damaged = {attempt: text for attempt, text in damaged.items() if attempt not in claims}
    manifests = sorted({identity for history in histories for identity in history.manifests})
    return History(claims | _unreadable(damaged), tuple(manifests), damaged)


def _unreadable(damaged: Iterable[int]) -> dict[int, Claim]:
    return {attempt: Claim(attempt=attempt, created_at=utc_now(), reason="unreadable") for attempt in damaged}


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
    return claim_and_look(store, rollback_to=rollback_to)[0]


def claim_and_look(store: ObjectStore, *, rollback_to: CheckpointId | None = None) -> tuple[Claim, History]:
    """As `claim_attempt`; also returns what a listing told after the claim, for `resolve`."""
    known: History | None = None

    def read() -> Sequence[History]:
        nonlocal known
        known = read_history(store, known=known)
        return [known]

    def write(claim: Claim) -> None:
        create_object(store, claim_key(claim.attempt), claim.to_bytes())

    return take_attempt(read, write, rollback_to=rollback_to)


def take_attempt(
    read: Callable[[], Sequence[History]],
    write: Callable[[Claim], None],
    *,
    rollback_to: CheckpointId | None = None,
) -> tuple[Claim, History]:
    """As `claim_attempt`, wherever the claims are.

    Args:
        read: Lists every store of the run.
        write: Writes a claim, create-only, into every store; raises ObjectExistsError where the number is taken in one of them.
        rollback_to: Continue from this checkpoint instead of the newest.

    Returns:
        The claim as written, and what a listing told after it.

    Raises:
        NoUsableCheckpointError: Claims are damaged, and without them no checkpoint is known to be of this history.
    """
    skip = 0
    while True:
        before = merge_histories(read())
        line = before.lineage
        if rollback_to is None and not line and before.damaged:
            # A claim made now would say that there was nothing to continue, for good, even if the damaged ones are brought back.
            raise NoUsableCheckpointError(
                "it is not known which checkpoints belong to this run:\n  "
                + "\n  ".join(before.damaged.values())
                + "\n"
                "Bring the claims back, 'spotguard rollback' to a whole checkpoint, or start a new run under another URI"
            )
        parent = rollback_to or next(iter(line), None)
        claim = Claim(
            attempt=before.newest_attempt + 1 + skip,
            parent=parent.attempt if parent else None,
            parent_max_step=parent.step if parent else None,
            parent_max_sequence=parent.sequence if parent else None,
            reason="start" if rollback_to is None else "rollback",
            host=socket.gethostname(),
            pid=os.getpid(),
            created_at=utc_now(),
        )
        try:
            write(claim)
        except ObjectExistsError:
            # Somebody was faster, or died between taking the name and giving it content; in the latter case go on to the next number.
            skip = skip + 1 if merge_histories(read()).newest_attempt == before.newest_attempt else 0
            continue
        # A process that is about to be fenced off may have committed between our listing and our claim, and swept away what we are about
        # to resume from. From here on no commit of it can go unseen by its own sweep, so one more look is enough; and the claim just made,
        # without a commit, is passed over by that look and by everybody else's.
        after = merge_histories(read())
        if rollback_to is None and after.newest_attempt == claim.attempt and after.lineage[:1] != line[:1]:
            skip = 0
            continue
        return claim, after
