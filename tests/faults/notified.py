"""A loop under a guard that is told of notices, over stores that take as long as they are told to."""

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from spotguard import Preempted, PreemptionNotice, SpotGuard, TrainState
from spotguard.checkpoint import ExitRecord
from spotguard.checkpoint.layout import CHECKPOINTS, EXIT
from spotguard.errors import TransientStoreError
from spotguard.events import CheckpointCommitted, Event, FinalSavePlanned
from spotguard.pipeline.objects import read_object
from spotguard.stores import MemoryObjectStore, ObjectStore

_numbers = itertools.count()


class Told:
    """A source that says what the test tells it."""

    def __init__(self, name: str = "told") -> None:
        self.name = name
        self._emit: Callable[[PreemptionNotice], None] | None = None
        self.heard = threading.Event()

    def watch(self, emit: Callable[[PreemptionNotice], None], stop: threading.Event) -> None:
        self._emit = emit
        self.heard.set()
        stop.wait()

    def tell(self, **fields: Any) -> None:
        assert self.heard.wait(10)
        assert self._emit is not None
        self._emit(
            PreemptionNotice(**{"source": self.name, "kind": "preemption", "detail": "told", "id": "1"} | fields)
        )

    def tell_in(self, seconds: float, **fields: Any) -> None:
        now = time.monotonic()
        self.tell(deadline=now + seconds, received=now, **fields)


class Slow:
    """A store whose shards take `seconds` to be written, or until it is let go."""

    def __init__(self, store: ObjectStore, seconds: float = 0.0) -> None:
        self._store, self.seconds = store, seconds
        self.go = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    @contextlib.contextmanager
    def create(self, key: str, *, exclusive: bool = False, deadline: float | None = None) -> Iterator[Any]:
        with self._store.create(key, exclusive=exclusive, deadline=deadline) as writer:
            yield writer
            if key.startswith(CHECKPOINTS) and "rank" in key:
                self.go.wait(self.seconds)


def in_turn(*actions: Callable[[], object]) -> Callable[[], None]:
    """Several of them as one."""

    def act() -> None:
        for action in actions:
            action()

    return act


class Breaks(Slow):
    """One that can be broken: then nothing of a checkpoint is written."""

    broken = False

    @contextlib.contextmanager
    def create(self, key: str, **options: Any) -> Iterator[Any]:
        if self.broken and key.startswith(CHECKPOINTS):
            raise TransientStoreError("the network is away")
        with super().create(key, **options) as writer:
            yield writer


class Training:
    """A loop of short steps under a guard."""

    def __init__(self, *tiers: ObjectStore, every: Any = "1h", **options: Any) -> None:
        self.told, self.events = Told(), list[Event]()
        self.model = torch.nn.Linear(4, 2)
        self.stores = tiers or (MemoryObjectStore(f"memory://deadlines-{next(_numbers)}"),)
        self.guard = SpotGuard(
            list(self.stores) if len(self.stores) > 1 else self.stores[0],
            TrainState(model=self.model),
            every=every,
            on_event=self._hear,
            **{"notices": [self.told], **options},
        )
        self.on_event: Callable[[Event], object] = lambda event: None
        self.at_step: dict[int, Callable[[], object]] = {}

    def _hear(self, event: Event) -> None:
        self.events.append(event)
        self.on_event(event)

    def run(self, steps: int = 1000, step_s: float = 0.005) -> int | None:
        """The exit status; None if the loop came to its end."""
        try:
            with self.guard:
                for step in self.guard.steps(steps):
                    self.at_step.get(step, lambda: None)()
                    with torch.no_grad():
                        self.model.weight += 0.01
                    time.sleep(step_s)
        except Preempted as left:
            self.left_at = time.monotonic()
            return int(left.code or 0)
        return None

    def committed(self) -> list[int]:
        return [event.step for event in self.events if isinstance(event, CheckpointCommitted)]

    def count(self, kind: type[Event]) -> int:
        return sum(isinstance(event, kind) for event in self.events)

    def wait_for(self, kind: type[Event], count: int = 1) -> None:
        """From inside a step: until so many events of a kind have been told of."""
        until = time.monotonic() + 60
        while self.count(kind) < count:
            assert time.monotonic() < until, self.events
            time.sleep(0.01)

    def wait_for_commit(self, count: int = 1) -> None:
        self.wait_for(CheckpointCommitted, count)

    def choices(self) -> list[str]:
        return [event.choice for event in self.events if isinstance(event, FinalSavePlanned)]

    @property
    def exit(self) -> ExitRecord:
        return ExitRecord.from_bytes(read_object(self.stores[-1], EXIT), key=EXIT)


def memory() -> MemoryObjectStore:
    return MemoryObjectStore(f"memory://deadlines-{next(_numbers)}")
