"""Several places for one run, some of which can be taken away for a while."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from faults.scenario import KEEP, snapshot_at
from spotguard.errors import TransientStoreError
from spotguard.events import Event
from spotguard.pipeline.resolver import Resolution
from spotguard.pipeline.tiers import Tiers
from spotguard.pipeline.writer import Writer
from spotguard.policies import KeepNewest
from spotguard.stores import LocalObjectStore, ObjectInfo, ObjectReader, ObjectRef, ObjectStore, ObjectWriter
from spotguard.stores.posix import Posix
from spotguard.testing.faults import Unsynced


class Outside:
    """A directory that passes for a place outside the machine.

    Attributes:
        down: It cannot be reached at all.
        refuses: Keys with this beginning cannot be written; None for none.
    """

    def __init__(self, root: Path, *, fs: Posix | None = None) -> None:
        self.root, self.uri = root, str(root)
        self.down, self.refuses = False, ""
        self._inner = LocalObjectStore(root, fs=fs or Unsynced())

    def _reach(self) -> None:
        if self.down:
            error = TransientStoreError(f"{self.uri} does not answer")
            error.exhausted = True
            raise error

    @contextlib.contextmanager
    def create(self, key: str, *, exclusive: bool = False, deadline: float | None = None) -> Iterator[ObjectWriter]:
        self._reach()
        if self.refuses and key.startswith(self.refuses):
            error = TransientStoreError(f"{self.uri}/{key} cannot be written")
            error.exhausted = True
            raise error
        with self._inner.create(key, exclusive=exclusive, deadline=deadline) as writer:
            yield writer

    def open(self, key: str, *, version: str | None = None) -> ObjectReader:
        self._reach()
        return self._inner.open(key, version=version)

    def stat(self, key: str, *, version: str | None = None) -> ObjectInfo | None:
        self._reach()
        return self._inner.stat(key, version=version)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        self._reach()
        return self._inner.list(prefix)

    def delete(self, refs: Iterable[ObjectRef]) -> None:
        self._reach()
        self._inner.delete(refs)

    def discard_partials(self, is_stale: Callable[[str], bool]) -> Sequence[str]:
        self._reach()
        return self._inner.discard_partials(is_stale)


@dataclasses.dataclass
class Job:
    """One start of the job."""

    tiers: Tiers
    writer: Writer
    attempt: int
    resolution: Resolution
    events: list[Event]

    def save(self, *steps: int, tiers: str = "all") -> None:
        """Commit these steps, one after the other."""
        for step in steps:
            self.writer.submit(snapshot_at(step), {}, tiers=tiers)
            self.writer.drain()

    def told(self, kind: type[Event]) -> list[Event]:
        """Events of that kind."""
        return [event for event in self.events if isinstance(event, kind)]


JOBS: list[Job] = []
"""All that were started; the tests end them."""


def start(*stores: ObjectStore, keep: int = KEEP) -> Job:
    """Start as the guard does: identity, claim, resolve; then the writer."""
    tiers = Tiers(stores)
    run_id = tiers.open()
    claim, history = tiers.claim()
    resolution = tiers.resolve(history, run_id)
    checkpoint = resolution.require()
    events: list[Event] = []
    writer = Writer(
        tiers,
        run_id=run_id,
        attempt=claim.attempt,
        retention=KeepNewest(keep),
        publish=events.append,
        resumed=checkpoint.manifest if checkpoint else None,
    )
    JOBS.append(Job(tiers, writer, claim.attempt, resolution, events))
    return JOBS[-1]


def save(stores: Sequence[ObjectStore], *steps: int, keep: int = KEEP) -> Job:
    """Start, commit these steps, each of which must work, and end."""
    job = start(*stores, keep=keep)
    for step in steps:
        job.save(step)
        assert job.writer.error is None, job.writer.error
    job.writer.close()
    return job
