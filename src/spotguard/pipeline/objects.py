"""Small whole objects, read and written with retries: a transient error is tried again, anything else is raised as it is."""

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Generic, TypeVar, cast

import tenacity

from spotguard._retry import FullJitter
from spotguard.errors import (
    CheckpointDamagedError,
    DeadlineExceededError,
    ObjectExistsError,
    StoreError,
    TransientStoreError,
)
from spotguard.stores import ObjectStore, Progress

__all__ = [
    "Outcome",
    "Tally",
    "create_object",
    "outcomes",
    "read_object",
    "read_record",
    "retried",
    "together",
    "write_object",
]

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_S = TypeVar("_S")

_THREADS = 8
_LOOK_S = 0.05  # between two questions whether that is enough


def retried(action: Callable[[], _T]) -> _T:
    """Do something with a store, up to five times over about ten seconds while it fails for now (full jitter)."""
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(lambda error: isinstance(error, TransientStoreError) and not error.exhausted),
        wait=FullJitter(0.2, longest=5.0),
        stop=tenacity.stop_after_attempt(5),
        reraise=True,
    )
    return retrying(action)


@dataclasses.dataclass(frozen=True)
class Outcome(Generic[_T]):
    """What came of one piece of work.

    Attributes:
        value: What it returned; None if it has raised.
        error: What it has raised: a `DeadlineExceededError` if nothing had come of it when there was no time left.
    """

    value: _T | None = None
    error: BaseException | None = None


def outcomes(
    action: Callable[[_S], _T],
    items: Iterable[_S],
    *,
    threads: int = _THREADS,
    until: float | None = None,
    enough: Callable[[Mapping[int, Outcome[_T]]], bool] | None = None,
) -> list[Outcome[_T]]:
    """Do the same with each item, several at once, and wait for all of them or for as long as there is time.

    The threads are daemons: a store that does not answer must not hold back the process.

    Args:
        action: What to do.
        items: With what.
        threads: How many at once.
        until: Instant (monotonic seconds) up to which to wait.
        enough: Asked again and again: whether not to wait for the others, given what has come of some, by their places.
    """
    wanted: Sequence[_S] = list(items)
    found: dict[int, Outcome[_T]] = {}
    numbers, changed, over = iter(range(len(wanted))), threading.Condition(), threading.Event()

    def work() -> None:
        while not over.is_set():
            with changed:
                number = next(numbers, None)
            if number is None:
                return
            try:
                outcome = Outcome(action(wanted[number]))
            except BaseException as error:  # noqa: BLE001 - handed to whoever waits
                outcome = Outcome[_T](error=error)
            with changed:
                found[number] = outcome
                changed.notify_all()

    for _ in range(min(threads, len(wanted))):
        threading.Thread(target=work, name="spotguard-store", daemon=True).start()
    with changed:
        while len(found) < len(wanted) and not (enough is not None and enough(found)):
            left = None if until is None else until - time.monotonic()
            if left is not None and left <= 0:
                break
            changed.wait(left if enough is None else _LOOK_S if left is None else min(_LOOK_S, left))
        over.set()
        in_time = until is None or time.monotonic() < until
        why = "it was not waited for, since another has it" if in_time else "the store has not answered in time"
        late = Outcome[_T](error=DeadlineExceededError(why))
        return [found.get(number, late) for number in range(len(wanted))]


def together(action: Callable[[_S], _T], items: Iterable[_S]) -> list[_T]:
    """Do the same with each item, several at once: a store across a network answers many requests in the time of one."""
    wanted: Sequence[_S] = list(items)
    if len(wanted) < 2:
        return [action(item) for item in wanted]
    values = []
    for outcome in outcomes(action, wanted):
        if outcome.error is not None:
            raise outcome.error
        values.append(outcome.value)
    return cast("list[_T]", values)


class Tally:
    """Progress of a piece of work that may have to begin again: what was counted is then taken back.

    Args:
        progress: Called with the number of bytes done, negative where they are taken back.
        check: Called before; what it raises ends the work.
    """

    def __init__(self, progress: Progress | None, check: Callable[[], None] | None = None) -> None:
        self._progress, self._check, self._done = progress, check, 0
        self._lock = threading.Lock()

    def __call__(self, count: int) -> None:
        """So many more bytes are done. Safe from any thread."""
        if self._check is not None:
            self._check()
        if self._progress is not None:
            with self._lock:
                self._done += count
            self._progress(count)

    def restart(self) -> None:
        """The work begins (again)."""
        if self._done:
            self(-self._done)


def read_object(store: ObjectStore, key: str) -> bytes:
    """All bytes of an object; raises ObjectNotFoundError when it is not there."""

    def read() -> bytes:
        with store.open(key) as reader:
            return reader.read()

    return retried(read)


def read_record(store: ObjectStore, key: str, parse: Callable[[bytes], _T]) -> _T:
    """Read a record, which can tell by itself whether it is intact. That it is not may be the doing of the network.

    Raises:
        CheckpointDamagedError: Two readings gave the same bytes, and these are not intact.
        StoreError: Each of three readings gave other bytes.
    """
    seen: list[bytes] = []
    for _ in range(3):
        data = read_object(store, key)
        try:
            record = parse(data)
        except CheckpointDamagedError:
            if data in seen:
                raise
            seen.append(data)
        else:
            if seen:
                logger.warning(
                    "%s/%s came with other bytes at first, and intact when it was read again", store.uri, key
                )
            return record
    raise StoreError(changing_bytes(f"{store.uri}/{key}"))


def changing_bytes(where: str) -> str:
    """What to say of an object that is another one each time it is read."""
    return (
        f"{where}: its bytes change from one reading to the next, so the network or the memory of this machine is at fault, "
        "and nothing is known of the object. Try again, on another machine if this goes on"
    )


def write_object(
    store: ObjectStore, key: str, data: bytes, *, exclusive: bool = False, deadline: float | None = None
) -> None:
    """Write an object whole, by an instant (monotonic seconds) where there is one."""

    def write() -> None:
        with store.create(key, exclusive=exclusive, deadline=deadline) as writer:
            writer.write(data)

    retried(write)


def create_object(store: ObjectStore, key: str, data: bytes, *, deadline: float | None = None) -> None:
    """Create an object, exclusively. One that is there with these very bytes is the one: the answer to a create may get lost.

    Raises:
        ObjectExistsError: Another one has the name.
    """
    try:
        write_object(store, key, data, exclusive=True, deadline=deadline)
    except ObjectExistsError as error:
        try:
            same = read_object(store, key) == data
        except FileNotFoundError:  # a name that was taken and never given content, on a mount without hard links
            same = False
        if not same:
            raise error
