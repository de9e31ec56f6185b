"""Examine the place that a run is, or will be, in: what could keep a notice from being heard, or a save from being made in time."""

import time
import warnings

from spotguard._time import parse_seconds
from spotguard.errors import ConfigError, SpotguardError
from spotguard.notices.platforms import detect_platform
from spotguard.ops.doctor.asking import skew
from spotguard.ops.doctor.findings import Finding, Level
from spotguard.ops.doctor.metadata import examine_metadata
from spotguard.ops.doctor.place import examine_grace, examine_platform, is_container, least_time
from spotguard.ops.doctor.process import ancestors, examine_ancestors, examine_ranks, examine_signals, read_process
from spotguard.ops.doctor.saves import examine_saves
from spotguard.ops.doctor.stores import examine_store, open_run_place
from spotguard.ops.doctor.training import examine_training, training_of
from spotguard.settings import load_settings
from spotguard.stores import ObjectStore

__all__ = ["Finding", "Level", "examine", "examine_clock"]

# a deadline is a time of day: a clock that is off by so many seconds shortens the two minutes by them
_OFF_S, _FAR_OFF_S = 2.0, 30.0


def examine(uri: str | None = None, *, grace: str | None = None, pid: int | None = None) -> list[Finding]:
    """Look at everything that can be looked at from here. What is written on the way is deleted again.

    Args:
        uri: Where the run is kept, or will be; None leaves the store out.
        grace: What the script says with ``grace=``.
        pid: Number of a training that runs here; by default that of the process that has claimed the newest attempt, if it is here.

    Raises:
        ConfigError: `grace` is not a duration.
    """
    platform, notices, findings = detect_platform(), "auto", list[Finding]()
    given = parse_seconds(grace, argument="--grace") if grace is not None else None
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            settings = load_settings()
            notices = settings.notices
            if given is None and settings.grace is not None:
                given = parse_seconds(settings.grace, argument="SPOTGUARD_GRACE")
        except ConfigError as error:
            findings.append(Finding("settings", "problem", str(error), "see docs/reference/settings.md"))
    findings += [Finding("settings", "warning", str(warning.message), "mend or unset it") for warning in said]
    findings += examine_platform(platform, notices=notices)
    asked = examine_metadata(platform.cloud if notices != "none" else None)
    findings += asked.findings
    store, trouble = open_run_place(uri) if uri is not None else (None, [])
    if pid is None and store is not None:
        pid = training_of(store)
    findings += examine_ancestors(ancestors(pid or "self"), read_process(1), in_container=is_container())
    if pid is None:
        findings += examine_signals(read_process(), wanted=platform.signals)
    else:
        findings += examine_training(pid, wanted=platform.signals)
    findings += examine_ranks()
    findings += examine_grace(platform, given)
    findings += trouble
    if store is not None:
        found = examine_store(store)
        findings += found
        if not any(finding.level == "problem" and finding.check != "disk" for finding in found):
            findings += examine_saves(store, least_time(platform, given))
    return [*findings, examine_clock(store, asked.skew_s)]


def examine_clock(store: ObjectStore | None, skew_s: float | None) -> Finding:
    """Compare our clock with that of a server.

    Args:
        store: Where the run is kept; one in S3 is asked for its time.
        skew_s: How far the metadata service's clock is ahead of ours, where that is known already.
    """
    who = "the metadata service"
    if skew_s is None and store is not None:
        skew_s, who = _skew_of(store), "the store"
    if skew_s is None:
        return Finding("clock", "info", "it is not known whether the clock is right: nobody here tells the time")
    off = abs(skew_s)
    if off < _OFF_S:
        return Finding("clock", "ok", f"the clock agrees with {who}, to about a second")
    way = "behind" if skew_s > 0 else "ahead of"
    text = f"the clock is {off:.0f} s {way} {who}: the deadline of a notice is a time of day, and is misread by as much"
    return Finding(
        "clock", "problem" if off > _FAR_OFF_S else "warning", text, "set the clock by NTP: 'chronyc makestep'"
    )


def _skew_of(store: ObjectStore) -> float | None:
    from spotguard.stores.s3 import S3ObjectStore

    if not isinstance(store, S3ObjectStore):
        return None
    began = time.time()
    try:
        answer = store.connection.call("list_objects_v2", Prefix=store.address.prefix, MaxKeys=1)
    except (SpotguardError, OSError):
        return None
    return skew(answer["ResponseMetadata"]["HTTPHeaders"], (began + time.time()) / 2)
