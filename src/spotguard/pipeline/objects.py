"""Small whole objects, read and written with retries: a transient error is tried again, anything else is raised as it is."""

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import tenacity

from spotguard._retry import FullJitter
from spotguard.errors import CheckpointDamagedError, ObjectExistsError, StoreError, TransientStoreError
from spotguard.stores import ObjectStore, Progress

__all__ = ["Tally", "create_object", "read_object", "read_record", "retried", "together", "write_object"]

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_S = TypeVar("_S")

_THREADS = 8


def retried(action: Callable[[], _T]) -> _T:
    """Do something with a store, up to five times over about ten seconds while it fails for now (full jitter)."""
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(lambda error: isinstance(error, TransientStoreError) and not error.exhausted),
        wait=FullJitter(0.2, longest=5.0),
        stop=tenacity.stop_after_attempt(5),
        reraise=True,
    )
    return retrying(action)


def together(action: Callable[[_S], _T], items: Iterable[_S]) -> list[_T]:
    """Do the same with each item, several at once: a store across a network answers many requests in the time of one."""
    wanted: Sequence[_S] = list(items)
    if len(wanted) < 2:
        return [action(item) for item in wanted]
    with ThreadPoolExecutor(min(_THREADS, len(wanted)), thread_name_prefix="spotguard-read") as pool:
        return list(pool.map(action, wanted))


class Tally:
    """Progress of a piece of work that may have to begin again: what was counted is then taken back.

    Args:
        progress: Called with the number of bytes done, negative where they are taken back.
    """

    def __init__(self, progress: Progress | None) -> None:
        self._progress, self._done = progress, 0
        self._lock = threading.Lock()

    def __call__(self, count: int) -> None:
        """So many more bytes are done. Safe from any thread."""
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
