"""Starts, commits, sweeps and kills of one run, in any order of their requests: no acknowledged commit is lost."""

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator

from hypothesis import example, given, settings
from hypothesis import strategies as st

from faults.scenario import snapshot_at
from spotguard.checkpoint import CheckpointId, Manifest
from spotguard.checkpoint.layout import ATTEMPTS, MANIFESTS, parse_manifest_key
from spotguard.errors import FencedError
from spotguard.pipeline.checkpoint import load_manifest
from spotguard.pipeline.commit import commit
from spotguard.pipeline.history import claim_and_look, open_run, read_history
from spotguard.pipeline.resolver import resolve
from spotguard.pipeline.sweeper import sweep
from spotguard.policies import KeepNewest
from spotguard.stores import MemoryObjectStore, ObjectInfo, ObjectRef, ObjectWriter

Parents = dict[CheckpointId, CheckpointId | None]


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


class GatedStore(MemoryObjectStore):
    """Another store's content; each listing, deletion, claim and commit is one step of a process."""

    def __init__(
        self, inner: MemoryObjectStore, process: Process, acknowledged: set[CheckpointId], parents: Parents
    ) -> None:
        self.__dict__.update(inner.__dict__)
        self._inner, self._process, self._acknowledged, self._parents = inner, process, acknowledged, parents

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        self._process.gate()
        return iter(list(super().list(prefix)))

    def delete(self, refs: Iterable[ObjectRef]) -> None:
        self._process.gate()
        super().delete(refs)

    @contextlib.contextmanager
    def create(self, key: str, *, exclusive: bool = False, deadline: float | None = None) -> Iterator[ObjectWriter]:
        if key.startswith((ATTEMPTS, MANIFESTS)):
            self._process.gate()
        with super().create(key, exclusive=exclusive, deadline=deadline) as writer:
            yield writer
        identity = parse_manifest_key(key)
        if identity is not None:
            parent = load_manifest(self._inner, identity).parent
            self._parents[identity] = CheckpointId.parse(parent) if parent else None
            if identity.attempt == read_history(self._inner).newest_attempt:
                self._acknowledged.add(identity)


def train(store: MemoryObjectStore) -> None:
    """A start of the job, as the guard makes it: two commits, a sweep behind each."""
    run_id = open_run(store).run_id
    claim, history = claim_and_look(store)
    checkpoint = resolve(store, run_id=run_id, history=history).require()
    last: Manifest | None = checkpoint.manifest if checkpoint else None
    for _ in range(2):
        step = last.step + 10 if last else 10
        last, _ = commit(store, snapshot_at(step), run_id=run_id, attempt=claim.attempt, previous=last)
        sweep(store, KeepNewest(1), owner=claim.attempt)


@settings(max_examples=400, deadline=None)
@example([(0, 6, False), (1, 8, False), (2, 12, False), (1, 1, False)])
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 12), st.sampled_from([False, False, True])), max_size=30))
def test_whatever_the_order_of_requests_and_kills_the_next_start_goes_on_from_every_acknowledged_commit(
    schedule: list[tuple[int, int, bool]],
) -> None:
    inner = MemoryObjectStore()
    open_run(inner)
    acknowledged, parents = set[CheckpointId](), Parents()
    processes: list[Process] = []

    try:
        processes += [
            Process(lambda process: train(GatedStore(inner, process, acknowledged, parents))) for _ in range(4)
        ]
        for number, requests, kill in schedule:
            for _ in range(requests):
                processes[number].step()
            processes[number].step(kill=kill)
    finally:
        for process in processes:
            process.step(kill=True)
    assert [process.error for process in processes] == [None] * len(processes)
    newest = resolve(inner, history=claim_and_look(inner)[1]).require()
    behind, identity = set[CheckpointId](), newest.manifest.id if newest else None
    while identity is not None:
        behind.add(identity)
        identity = parents[identity]
    assert acknowledged <= behind
