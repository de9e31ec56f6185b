"""Events as JSON lines in the run, for reports: a hook like any other."""

import logging

from spotguard.checkpoint.layout import event_key
from spotguard.events import CheckpointCommitted, Event, SaveSkipped, SaveStarted
from spotguard.pipeline.objects import write_object
from spotguard.stores import ObjectStore

__all__ = ["EventLog"]

logger = logging.getLogger(__name__)

_SEGMENT = 1000  # lines; objects cannot be appended to, so a segment is written anew until it is full


class EventLog:
    """Writes what happened in this attempt; at the latest when a checkpoint is committed, and when the attempt ends.

    Args:
        store: The run.
        attempt: This attempt.
        rank: This rank.
    """

    def __init__(self, store: ObjectStore, attempt: int, rank: int = 0) -> None:
        self._store, self._attempt, self._rank = store, attempt, rank
        self._segment = 0
        self._lines: list[str] = []
        self._failed = False

    def __call__(self, event: Event) -> None:
        """Take an event, and write where that is due."""
        self._lines.append(event.to_json())
        if not isinstance(event, (SaveStarted, SaveSkipped)):  # a commit, or a failure, follows
            self._write()
        if len(self._lines) >= _SEGMENT and isinstance(event, CheckpointCommitted):
            self._segment, self._lines = self._segment + 1, []

    def _write(self) -> None:
        key = event_key(self._attempt, self._rank, self._segment)
        try:
            write_object(self._store, key, "".join(line + "\n" for line in self._lines).encode())
        except OSError as error:
            if not self._failed:
                logger.warning("the event log %s cannot be written, training goes on without it: %s", key, error)
            self._failed = True
