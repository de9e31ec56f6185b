"""Lines for the person who reads the job's log."""

import logging
import sys

__all__ = ["say"]

logger = logging.getLogger("spotguard.guard")


def say(text: str) -> None:
    """One line on standard error, and to logging. Start, resume, stop and end only: a handful for each start of the job."""
    logger.info("%s", text)
    print(f"spotguard: {text}", file=sys.stderr, flush=True)  # noqa: T201 - the job's log is where a stop is looked for
