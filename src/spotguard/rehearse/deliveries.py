"""What a platform delivered, interruption by interruption, in words: for the terminal and for the page."""

import dataclasses
from collections.abc import Sequence

from spotguard.rehearse.record import Delivered, Start

__all__ = ["Received", "received"]


@dataclasses.dataclass(frozen=True)
class Received:
    """One interruption, as it went.

    Attributes:
        start: Number of the start.
        kind: Which one.
        step: Where it began.
        acts: What was delivered: seconds from its beginning, and words.
        window: How much of the time that was given has been used; empty where none was.
        trained: How much of that went into steps that count.
    """

    start: int
    kind: str
    step: int
    acts: tuple[tuple[str, str], ...]
    window: str = ""
    trained: str = ""


def received(starts: Sequence[Start]) -> tuple[Received, ...]:
    """Every interruption that came to pass, in order."""
    rows = []
    for start in starts:
        for strike in start.strikes:
            acts = tuple((f"{done.at - strike.at:.1f} s", _in_words(done)) for done in strike.delivered)
            row = Received(start.number, strike.kind, strike.step, acts)
            scenario = strike.interruption.scenario
            if strike is start.strike and scenario is not None and scenario.lead_s and start.window_s is not None:
                row = dataclasses.replace(
                    row,
                    window=f"{start.window_s:.1f} of {scenario.lead_s:.1f} s",
                    trained=f"{start.trained_in_window_s:.1f} s",
                )
            rows.append(row)
    return tuple(rows)


def _in_words(done: Delivered) -> str:
    if done.kind != "notice":
        return f"{done.what}: {done.trouble}" if done.trouble else done.what
    heard = f"heard after {done.heard_at - done.at:.1f} s" if done.heard_at is not None else "not heard"
    return f"{done.what}, {heard}"
