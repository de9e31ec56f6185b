"""Does a final save fit into what a stop leaves: from what this run has measured, else from a probe."""

import dataclasses
import datetime as dt
import itertools
import json
import os
import statistics
import time
from collections.abc import Iterable
from typing import Any

from spotguard._time import format_seconds
from spotguard.checkpoint.layout import EVENTS, attempt_of_key
from spotguard.errors import SpotguardError
from spotguard.ops.doctor.findings import Finding
from spotguard.ops.doctor.stores import probe_key, traceless
from spotguard.pipeline.objects import read_object
from spotguard.policies import p95, with_margin
from spotguard.stores import ObjectStore

__all__ = ["Measured", "examine_saves", "read_saves"]

_PROBE_SIZE = 8 << 20
_LAST = 100  # commits that are looked at, as the guard does
_REMEDY = "a faster tier in front, SpotGuard(['/fast/run', 's3://...'], ...); saving more often, every=..."


@dataclasses.dataclass(frozen=True)
class Measured:
    """What the newest attempt that has saved anything has measured.

    Attributes:
        attempt: Which one.
        save_s: Seconds from the boundary to the commit, in all tiers; 95 of 100 took no longer.
        step_s: Seconds of a step, in the middle.
        size: Bytes of the newest checkpoint.
        count: Commits that were counted.
    """

    attempt: int
    save_s: float
    step_s: float
    size: int
    count: int


def read_saves(store: ObjectStore) -> Measured | None:
    """Read the event log of the newest attempt that has committed anything; None where there is none."""
    keys: dict[int, list[str]] = {}
    for info in store.list(EVENTS):
        attempt = attempt_of_key(info.key)
        if attempt is not None and info.key.endswith(".jsonl"):
            keys.setdefault(attempt, []).append(info.key)
    for attempt in sorted(keys, reverse=True):
        lines = [line for key in keys[attempt] for line in read_object(store, key).splitlines()]
        measured = _measure(attempt, [fields for line in lines if isinstance(fields := _parse(line), dict)])
        if measured is not None:
            return measured
    return None


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:  # torn: the log is a help, and has no digest
        return None


def _measure(attempt: int, events: Iterable[dict[str, Any]]) -> Measured | None:
    seconds: dict[str, float] = {}
    starts, size = list[tuple[float, int, float]](), 0
    for fields in events:
        try:
            if fields["event"] == "CheckpointCommitted":
                name = str(fields["checkpoint"])  # one event for each tier
                seconds[name], size = seconds.get(name, 0.0) + float(fields["seconds"]), int(fields["size"])
            elif fields["event"] == "SaveStarted":
                at = dt.datetime.fromisoformat(fields["at"]).timestamp()
                starts.append((at, int(fields["step"]), float(fields["stall_s"])))
        except (KeyError, TypeError, ValueError):
            continue
    commits = list(seconds.values())[-_LAST:]
    if not commits:
        return None
    starts.sort()
    steps = [
        (later[0] - earlier[0]) / (later[1] - earlier[1])
        for earlier, later in itertools.pairwise(starts)
        if later[1] > earlier[1]
    ]
    save_s = (p95(commits) or 0.0) + (p95(stall for _, _, stall in starts) or 0.0)
    return Measured(attempt, save_s, statistics.median(steps) if steps else 0.0, size, len(commits))


def examine_saves(store: ObjectStore, least: tuple[float, str] | None) -> list[Finding]:
    """Compare what a save takes with what a stop leaves.

    Args:
        store: The run.
        least: Seconds that a stop leaves, and who leaves them; None where nobody knows.
    """
    try:
        measured = read_saves(store)
        if measured is None:
            return _probe(store, least)
    except (SpotguardError, OSError) as error:
        text = f"what a save takes could not be found out: {error}"
        return [
            Finding("save", "warning", text, "mend that, and ask again; until then nobody can say whether a save fits")
        ]
    what = (
        f"a final save takes about {format_seconds(measured.save_s)} after a step of {format_seconds(measured.step_s)}"
    )
    what += f" ({measured.count} commits of attempt {measured.attempt}, {measured.size / 1e6:.1f} MB)"
    if least is None:
        return [Finding("save", "info", f"{what}; it is not known how long a stop leaves", "set grace=")]
    fits = measured.step_s + with_margin(measured.save_s) <= least[0]
    compared = f"{what}; {least[1]} leaves {format_seconds(least[0])}"
    if fits:
        return [Finding("save", "ok", compared)]
    return [
        Finding("save", "problem", f"{compared}: an interruption falls back to the last periodic checkpoint", _REMEDY)
    ]


def _probe(store: ObjectStore, least: tuple[float, str] | None) -> list[Finding]:
    key, data = probe_key(), os.urandom(_PROBE_SIZE)  # random: nothing on the way can make it smaller
    with traceless(store):
        began = time.monotonic()
        with store.create(key) as writer:
            writer.write(data)
        seconds = time.monotonic() - began
        if writer.info is not None:
            store.delete([writer.info.ref])
    rate = _PROBE_SIZE / max(seconds, 1e-9)
    what = (
        f"no save has been measured here; {_PROBE_SIZE >> 20} MiB took {format_seconds(seconds)}, so 1 GB takes about "
    )
    what += format_seconds(1e9 / rate)
    if least is None:
        return [Finding("save", "info", what)]
    return [
        Finding(
            "save",
            "info",
            f"{what}; {least[1]} leaves {format_seconds(least[0])}: enough for {rate * least[0] / 1e9:.1f} GB",
        )
    ]
