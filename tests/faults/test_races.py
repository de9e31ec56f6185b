"""Starts, commits, sweeps, rollbacks and kills of one run, in any order of their requests: nothing that was acknowledged is lost."""

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator

from hypothesis import example, given, settings
from hypothesis import strategies as st

from faults.scenario import snapshot_at
from spotguard.checkpoint import CheckpointId, Manifest
from spotguard.checkpoint.layout import ATTEMPTS, MANIFESTS, parse_manifest_key
from spotguard.errors import CheckpointDamagedError, CheckpointNotFoundError, FencedError, NoUsableCheckpointError
from spotguard.pipeline.checkpoint import load_manifest
from spotguard.pipeline.commit import commit
from spotguard.pipeline.history import claim_and_look, list_claims, open_run, read_history
from spotguard.pipeline.resolver import resolve
from spotguard.pipeline.rollback import roll_back
from spotguard.pipeline.sweeper import sweep
from spotguard.policies import KeepNewest
from spotguard.stores import MemoryObjectStore, ObjectInfo, ObjectReader, ObjectRef, ObjectWriter


class Killed(BaseException):
    """The process is no more."""


class Process(threading.Thread):
    """Works up to its next request on the store, and waits there until it is let go."""

    def __init__(self, work: Callable[["Process"], None]) -> None:
        super().__init__(daemon=True)
        self._work = work
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._killed = self.finished = False
        self.error: BaseException | None = None
        self.start()
        self._stopped.acquire()

    def run(self) -> None:
        try:
            self._work(self)
        except (Killed, FencedError):
            pass
        except BaseException as error:  # noqa: BLE001 - looked at by the test
            self.error = error
        self.finished = True
        self._stopped.release()

    def gate(self) -> None:
        if self._killed:
            raise Killed
        self._stopped.release()
        self._go.acquire()
        if self._killed:
            raise Killed

    def step(self, *, kill: bool = False) -> None:
        if not self.finished:
            self._killed = kill
            self._go.release()
            self._stopped.acquire()


class Ledger:
    """What was acknowledged, and what each commit goes back to."""

    def __init__(self, store: MemoryObjectStore) -> None:
        self._store = store
        self._parents = dict[CheckpointId, CheckpointId | None]()
        self.acknowledged = set[CheckpointId]()

    def behind(self, identity: CheckpointId | None) -> set[CheckpointId]:
        """A commit, and all that it goes back to."""
        found = set[CheckpointId]()
        while identity is not None:
            found.add(identity)
            identity = self._parents[identity]
        return found

    def committed(self, identity: CheckpointId) -> None:
        """A commit by the newest attempt is acknowledged; a rollback takes back what was, up to its target."""
        parent = load_manifest(self._store, identity).parent
        self._parents[identity] = CheckpointId.parse(parent) if parent else None
        history = read_history(self._store)
        if history.claims[identity.attempt].reason == "rollback":
            later = [item for item in self.acknowledged if item.attempt > identity.attempt]
            self.acknowledged &= self.behind(identity).union(*map(self.behind, later))
        if identity.attempt == history.newest_attempt:
            self.acknowledged.add(identity)


class GatedStore(MemoryObjectStore):
    """Another store's content; each listing, deletion, claim and commit, and each look at a manifest, is one step of a process."""

    def __init__(self, inner: MemoryObjectStore, process: Process, ledger: Ledger) -> None:
        self.__dict__.update(inner.__dict__)
        self._process, self._ledger = process, ledger

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        self._process.gate()
        return iter(list(super().list(prefix)))

    def open(self, key: str, *, version: str | None = None) -> ObjectReader:
        if key.startswith(MANIFESTS) and threading.current_thread() is self._process:
            self._process.gate()
        return super().open(key, version=version)

    def delete(self, refs: Iterable[ObjectRef]) -> None:
        self._process.gate()
        super().delete(refs)

    @contextlib.contextmanager
    def create(self, key: str, *, exclusive: bool = False, deadline: float | None = None) -> Iterator[ObjectWriter]:
        if key.startswith((ATTEMPTS, MANIFESTS)):
            self._process.gate()
        with super().create(key, exclusive=exclusive, deadline=deadline) as writer:
            yield writer
        if (identity := parse_manifest_key(key)) is not None:
            self._ledger.committed(identity)


def train(store: MemoryObjectStore) -> None:
    """A start of the job, as the guard makes it: two commits, a sweep behind each."""
    run_id = open_run(store).run_id
    claim, history = claim_and_look(store)
    try:
        checkpoint = resolve(store, run_id=run_id, history=history).require()
        last: Manifest | None = checkpoint.manifest if checkpoint else None
        for _ in range(2):
            step = last.step + 10 if last else 10
            last, _ = commit(store, snapshot_at(step), run_id=run_id, attempt=claim.attempt, previous=last)
            sweep(store, KeepNewest(1 + claim.attempt % 2), owner=claim.attempt)
    except (NoUsableCheckpointError, CheckpointDamagedError):
        if max(list_claims(store)) == claim.attempt:
            raise  # else what it read was swept by whoever has started since


def go_back(store: MemoryObjectStore) -> None:
    """A rollback to the oldest checkpoint there is, which every sweep is after."""
    history = read_history(store)
    if history.lineage:
        with contextlib.suppress(CheckpointNotFoundError, CheckpointDamagedError):
            roll_back(store, history.lineage[-1])


def prune(store: MemoryObjectStore) -> None:
    """Somebody else's sweep; what it verifies may be swept by the trainer, and then it deletes nothing."""
    with contextlib.suppress(CheckpointDamagedError):
        sweep(store, KeepNewest(1))


WORK = (train, train, train, train, go_back, go_back, prune)


@settings(max_examples=500, deadline=None)
@example([(0, 6, False), (1, 8, False), (2, 12, False), (1, 1, False)])
@given(
    st.lists(
        st.tuples(st.integers(0, len(WORK) - 1), st.integers(1, 14), st.sampled_from([False, False, True])), max_size=30
    )
)
def test_whatever_the_order_of_requests_and_kills_the_next_start_goes_on_from_all_that_was_acknowledged(
    schedule: list[tuple[int, int, bool]],
) -> None:
    inner = MemoryObjectStore()
    open_run(inner)
    ledger = Ledger(inner)
    processes: list[Process] = []

    def start(work: Callable[[MemoryObjectStore], None]) -> Process:
        return Process(lambda process: work(GatedStore(inner, process, ledger)))

    try:
        processes += [start(work) for work in WORK]
        for number, requests, kill in schedule:
            for _ in range(requests):
                processes[number].step()
            processes[number].step(kill=kill)
    finally:
        for process in processes:
            process.step(kill=True)
    assert [process.error for process in processes] == [None] * len(processes)
    newest = resolve(inner, history=claim_and_look(inner)[1]).require()
    assert ledger.acknowledged <= ledger.behind(newest.manifest.id if newest else None)
