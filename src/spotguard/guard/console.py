"""Lines for the person who reads the job's log."""

import contextlib
import logging
import sys
import threading
from collections.abc import Iterator

__all__ = ["say", "say_after"]

logger = logging.getLogger("spotguard.guard")


def say(text: str) -> None:
    """One line on standard error, and to logging. Start, resume, stop and end only: a handful for each start of the job."""
    logger.info("%s", text)
    print(f"spotguard: {text}", file=sys.stderr, flush=True)  # noqa: T201 - the job's log is where a stop is looked for


@contextlib.contextmanager
def say_after(seconds: float, text: str) -> Iterator[None]:
    """Say it if the block takes longer than that."""
    timer = threading.Timer(seconds, say, [text])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
