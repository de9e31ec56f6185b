"""The word that an attempt leaves of how it ended: ``exit.json``."""

import contextlib
import logging
import os
import socket
import threading
import time
from typing import Literal

from spotguard._time import utc_now
from spotguard.checkpoint import ExitRecord
from spotguard.checkpoint.layout import EXIT
from spotguard.errors import SpotguardError
from spotguard.pipeline.objects import read_object, write_object
from spotguard.stores import ObjectStore

__all__ = ["LastWord"]

logger = logging.getLogger(__name__)

_PATIENCE_S = 5.0  # it is a help, not the guarantee: the exit is more important


class LastWord:
    """Writes the exit record, without fail and not for long. What is said last stands in the end, and nothing is said behind a final word.

    A later attempt may have come meanwhile: its word is not overwritten.

    Args:
        store: The run.
        attempt: This attempt.
    """

    def __init__(self, store: ObjectStore, attempt: int) -> None:
        self._store, self._attempt = store, attempt
        self._lock, self._writing = threading.Lock(), threading.Lock()
        self._record: ExitRecord | None = None
        self._written: ExitRecord | None = None
        self._final = False

    def say(
        self,
        state: Literal["preempted", "finished", "failed"],
        step: int,
        *,
        checkpoint: str | None = None,
        notice: str | None = None,
        detail: str = "",
        exit_code: int | None = None,
        final: bool = True,
        patience: float = _PATIENCE_S,
    ) -> None:
        """Leave word, within `patience` seconds. One that is not `final` may be followed by another."""
        record = ExitRecord(
            attempt=self._attempt,
            state=state,
            step=step,
            checkpoint=checkpoint,
            notice=notice,
            detail=detail,
            exit_code=exit_code,
            host=socket.gethostname(),
            at=utc_now(),
        )
        with self._lock:
            if self._final and not final:
                return
            self._record, self._final = record, self._final or final
        patience = min(patience, _PATIENCE_S)
        name = f"spotguard-exit-{os.getpid()}"
        thread = threading.Thread(target=self._write, args=(patience,), name=name, daemon=True)
        thread.start()
        thread.join(patience)

    def _write(self, patience: float) -> None:
        with self._writing:  # one that hangs is not overtaken, or it would come last
            record = self._record
            if record is None or record is self._written:
                return
            with contextlib.suppress(SpotguardError, OSError):
                if ExitRecord.from_bytes(read_object(self._store, EXIT), key=EXIT).attempt > self._attempt:
                    return
            try:
                write_object(self._store, EXIT, record.to_bytes(), deadline=time.monotonic() + patience)
                self._written = record
            except (SpotguardError, OSError) as error:
                logger.warning("%s/%s could not be written: %s", self._store.uri, EXIT, error)
