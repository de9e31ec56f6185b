"""A run in several places: the stores it is kept in, fastest first, which of them can be reached, and what they tell together.

Each tier is a whole run by itself: ``run.json``, claims, manifests and shards. What is said of the run as a whole is the union.

::

    open()       the same identity everywhere
    claim()      one number, created in every tier that can be reached; first in those that outlive the machine, so that all agree
    resolve()    newest first; of one checkpoint the fastest copy that is whole
    admit()      a tier that comes back gets the identity and the claims before anything is committed to it
"""

import contextlib
import time
from collections.abc import Iterator, Sequence

from spotguard.checkpoint import CheckpointId, Claim, Manifest, RunRecord
from spotguard.checkpoint.layout import RUN, claim_key
from spotguard.errors import CheckpointDamagedError, ConfigError, FencedError, ObjectExistsError, StoreError
from spotguard.pipeline.checkpoint import Checkpoint, Progress, ask_store, load_manifest
from spotguard.pipeline.fence import ClaimGoneError, check_fence
from spotguard.pipeline.history import History, take_attempt
from spotguard.pipeline.identity import find_run, open_run
from spotguard.pipeline.objects import create_object, outcomes, together
from spotguard.pipeline.refill import Refill
from spotguard.pipeline.resolver import Place, Resolution, resolve_among
from spotguard.pipeline.sweeper import Known
from spotguard.pipeline.tier import Tier
from spotguard.stores import LocalObjectStore, MemoryObjectStore, ObjectStore

__all__ = ["Tiers"]

_FENCE_S = 2.0  # a store that works answers in a fraction of it


class Tiers:
    """The tiers of one run.

    Args:
        stores: Fastest first. Directories and memory do not outlive the machine; where there is nothing else, they are taken to.

    Attributes:
        all: Every tier, fastest first.
        newest: The newest checkpoint in a tier that outlives the machine.
    """

    def __init__(self, stores: Sequence[ObjectStore]) -> None:
        outlives = [not isinstance(store, (LocalObjectStore, MemoryObjectStore)) for store in stores]
        self.all = tuple(Tier(store, lasts or not any(outlives)) for store, lasts in zip(stores, outlives, strict=True))
        self.newest: Checkpoint | None = None
        self._record: RunRecord | None = None
        self._chain: tuple[Claim, ...] = ()

    @classmethod
    def ready(cls, store: ObjectStore, resumed: Manifest | None) -> "Tiers":
        """A single store, where the attempt is claimed already."""
        tiers = cls([store])
        tiers.all[0].admitted, tiers.all[0].last = True, resumed
        tiers.newest = Checkpoint(store, resumed) if resumed is not None else None
        return tiers

    @property
    def several(self) -> bool:
        """Whether there is more than one."""
        return len(self.all) > 1

    @property
    def uri(self) -> str:
        """All of them, for messages."""
        return ", ".join(tier.store.uri for tier in self.all)

    @property
    def home(self) -> ObjectStore:
        """Where the log of events and a request to stop stand: the first that outlives the machine and can be reached."""
        return next((tier for tier in self._arbiters() if tier.error is None), self._arbiters()[0]).store

    @property
    def unreachable(self) -> list[Tier]:
        """Those that cannot be reached."""
        return [tier for tier in self.all if tier.error is not None]

    def select(self, which: str) -> tuple[Tier, ...]:
        """``"all"`` of them, or only the ``"fastest"``."""
        if which not in ("all", "fastest"):
            raise ConfigError(f"tiers={which!r}: write 'all' or 'fastest'")
        return self.all if which == "all" else self.all[:1]

    def open(self) -> str:
        """Give the run one identity in every tier that can be reached; returns it.

        Raises:
            ConfigError: Two of them belong to different runs.
            StoreError: None that outlives the machine can be reached, or one that has checkpoints has lost its identity.
        """
        if not self.several:
            self._record = open_run(self.all[0].store)
            return self._record.run_id
        found: dict[Tier, RunRecord] = {}
        orphaned: dict[Tier, CheckpointId] = {}
        for tier in self._arbiters():
            with self._reaching(tier):
                answer = find_run(tier.store)
                if isinstance(answer, RunRecord):
                    found[tier] = answer
                elif answer is not None:
                    orphaned[tier] = answer
        self._require_one()
        if not found:
            for tier, identity in orphaned.items():
                raise StoreError(
                    f"{tier.store.uri} holds checkpoints ({identity.manifest_key}) but no {RUN}. Bring {RUN} back, or choose another place"
                )
            self._require_all()
        record = next(iter(found.values()), None)
        for tier in self._reachable():
            with self._reaching(tier):
                if record is not None and tier in orphaned:
                    load_manifest(tier.store, orphaned[tier], run_id=record.run_id)  # or it is of another run
                answer = found.get(tier) or open_run(tier.store, record)
                record = record or answer
                self._compare(record, answer, tier)
        self._require_one()
        assert record is not None, "one can be reached"
        self._record = record
        return record.run_id

    def claim(self) -> tuple[Claim, History]:
        """Take the next attempt number in every tier that can be reached; see `take_attempt`.

        Returns:
            The claim, and what the tiers tell together after it.
        """
        claim, history = take_attempt(self._read, self._write)
        chain, known = [claim], history.intact
        while (parent := chain[-1].parent) is not None and parent in known and parent < chain[-1].attempt:
            chain.append(known[parent])
        self._chain = tuple(chain)
        for tier in self._reachable():
            with self._reaching(tier):
                if self.several:
                    self._copy_claims(tier)
                tier.admitted = True
        self._require_one()
        return claim, history

    def admit(self, tier: Tier) -> None:
        """Have the identity of the run and our claim there, before anything is committed.

        Raises:
            ConfigError: Another run is kept there.
            FencedError: Our number is taken there: somebody else has started, and did not see the tiers that we see.
        """
        if tier.admitted:
            return
        tier.last, tier.suspect, tier.known = None, False, Known()
        assert self._record is not None, "open() comes first"
        self._compare(self._record, open_run(tier.store, self._record), tier)
        claim = self._chain[0]
        try:
            create_object(tier.store, claim_key(claim.attempt), claim.to_bytes())
        except ObjectExistsError as error:
            raise FencedError(
                f"attempt {claim.attempt} was also claimed in {tier.store.uri}, by a start that could not see all the tiers that this one "
                "sees. This process must not write to it. Stop one of the two"
            ) from error
        self._copy_claims(tier)
        tier.admitted, tier.error = True, None

    def check_fences(self, attempt: int, *, patience: float = _FENCE_S) -> None:
        """Look for later claims in every tier that works, before anything is written. Where ours is gone, the tier has to be admitted anew.

        A tier that does not answer at once is not waited for: it is asked again before its own commit.

        Args:
            attempt: Our own.
            patience: Seconds to wait for the answers.

        Raises:
            FencedError: There is one, or our own claim is gone from every tier that outlives the machine.
        """

        def look(tier: Tier) -> ClaimGoneError | None:
            try:
                check_fence(tier.store, attempt)
            except ClaimGoneError as error:
                return error
            except StoreError:
                pass  # the commit will tell
            return None

        working = [tier for tier in self.all if tier.admitted and not tier.failures]
        answers = outcomes(look, working, until=time.monotonic() + patience)
        for error in [answer.error for answer in answers if isinstance(answer.error, FencedError)]:
            raise error
        gone = {tier: answer.value for tier, answer in zip(working, answers, strict=True) if answer.value is not None}
        surviving = [tier for tier in working if tier.surviving]
        if surviving and all(tier in gone for tier in surviving):
            raise gone[surviving[0]]
        for tier in gone:
            tier.admitted = False

    def resolve(self, history: History, run_id: str, progress: Progress | None = None) -> Resolution:
        """Choose, verify and read what to resume from; tiers before the one it is read from get a copy.

        Args:
            history: What `claim` returned.
            run_id: What `open` returned.
            progress: Called with the number of bytes done, for each piece.
        """
        tiers = [tier for tier in self.all if tier.error is None]
        listed = [tier.known.history for tier in tiers]
        places = [Place(tier.store, seen.refs) for tier, seen in zip(tiers, listed, strict=True) if seen is not None]
        refill = Refill(self.all)
        take = refill.take if self.several else None
        resolution = resolve_among(
            places, history, run_id=run_id, load=True, progress=progress, take=take, explain=True
        )
        if resolution.checkpoint is not None:
            refill.finish(resolution.checkpoint)
            self._go_on_from(resolution.checkpoint, history, {item.tier for item in resolution.rejected})
        return resolution

    def _go_on_from(self, chosen: Checkpoint, history: History, doubtful: set[str]) -> None:
        """Find what may be named again in each tier, and what the next machine would resume from."""
        identity = chosen.manifest.id
        for tier in [tier for tier in self.all if tier.error is None and tier.holds(identity)]:
            if tier.store is chosen.store:
                tier.last = chosen.manifest
                tier.known.note_whole(chosen.manifest)
            elif tier.store.uri not in doubtful:
                with contextlib.suppress(CheckpointDamagedError, StoreError):
                    manifest = load_manifest(tier.store, identity, run_id=chosen.manifest.run_id)
                    answers = together(lambda shard, store=tier.store: ask_store(store, shard), manifest.shards)  # type: ignore[misc]
                    tier.last = manifest.model_copy(update={"shards": tuple(shard for shard, _ in answers)})
        line = history.lineage
        for older in line[line.index(identity) :]:
            for tier in [tier for tier in self._reachable() if tier.surviving and tier.holds(older)]:
                with contextlib.suppress(CheckpointDamagedError, StoreError):
                    found = tier.last if older == identity else load_manifest(tier.store, older)
                    if found is not None:
                        self.newest = Checkpoint(tier.store, found)
                        return

    def _read(self) -> list[History]:
        histories = []
        for tier in self._reachable():
            with self._reaching(tier):
                histories.append(tier.known.look(tier.store))
        self._require_one()
        if not any(history.manifests for history in histories):
            self._require_all()
        return histories

    def _write(self, claim: Claim) -> None:
        for tier in self._reachable():
            with self._reaching(tier):
                create_object(tier.store, claim_key(claim.attempt), claim.to_bytes())
        self._require_one()

    def _copy_claims(self, tier: Tier) -> None:
        """The claims that ours goes back to, so that this tier tells the whole history by itself."""
        there = (tier.known.history or tier.known.look(tier.store)).intact

        def copy(claim: Claim) -> None:
            with contextlib.suppress(ObjectExistsError):
                create_object(tier.store, claim_key(claim.attempt), claim.to_bytes())

        together(copy, [claim for claim in self._chain if claim.attempt not in there])

    def _arbiters(self) -> list[Tier]:
        """Those that outlive the machine, then the others: everybody who claims begins with the same one."""
        return sorted(self.all, key=lambda tier: not tier.surviving)

    def _reachable(self) -> list[Tier]:
        return [tier for tier in self._arbiters() if tier.error is None]

    @contextlib.contextmanager
    def _reaching(self, tier: Tier) -> Iterator[None]:
        try:
            yield
        except ObjectExistsError:
            raise
        except StoreError as error:
            tier.error, tier.admitted = error, False

    def _require_one(self) -> None:
        surviving = [tier for tier in self.all if tier.surviving]
        errors = [tier.error for tier in surviving if tier.error is not None]
        if len(errors) == len(surviving):
            raise errors[0]

    def _require_all(self) -> None:
        """Where nothing is found: to begin anew while the run lies in what cannot be reached would be a silent start from zero."""
        for tier in [tier for tier in self.unreachable if tier.surviving]:
            raise StoreError(
                f"there is no checkpoint in the tiers that can be reached, and {tier.store.uri} cannot be: {tier.error}. "
                "Start again when it can, or leave it out if this is a new run"
            ) from tier.error

    def _compare(self, record: RunRecord, other: RunRecord, tier: Tier) -> None:
        if other.run_id != record.run_id:
            raise ConfigError(
                f"{tier.store.uri} holds run {other.run_id}, and the other tiers of {self.uri} hold run {record.run_id}: "
                "tiers are copies of one run. Give this run places of its own"
            )
