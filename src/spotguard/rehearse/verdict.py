"""How a start ended: what was wrong with that, in numbers, and what would mend it."""

import dataclasses

from spotguard._time import format_seconds
from spotguard.notices.platforms import Layer
from spotguard.rehearse.record import Start, Strike
from spotguard.rehearse.scenario import Scenario

__all__ = ["Circumstances", "bad_end", "remarks"]

_OWN_HANDLER = "does the script, or a library, set a signal handler of its own?"
_FASTER = "a faster tier in front, SpotGuard(['/fast/run', 's3://...'], ...); or less to save"


@dataclasses.dataclass(frozen=True)
class Circumstances:
    """What has to be known for a verdict.

    Attributes:
        layer: The platform; None where single signals are sent.
        save_s: Longest save of all starts, from the snapshot to the commit.
        step_s: Longest average step.
    """

    layer: Layer | None = None
    save_s: float = 0.0
    step_s: float = 0.0

    @property
    def remedies(self) -> str:
        """How to get more time, or to need less."""
        return f"Remedies: {self.layer.lengthen}; {_FASTER}" if self.layer is not None else f"Remedies: {_FASTER}"


def bad_end(start: Start, around: Circumstances) -> str | None:
    """What is wrong with the end of a start; None when a scheduler would do the right thing after it."""
    strike = start.strike
    if start.timed_out:
        after = f" after {strike.kind} at step {strike.step}" if strike else ""
        return f"it did not end{after} and was killed at the time limit; it hangs, or --timeout is too short"
    if strike is None:
        return _bad_end_by_itself(start)
    scenario = strike.interruption.scenario
    if scenario is None:
        return _bad_end_by_signal(start, strike)
    if scenario.asks_s is None:
        return _bad_end_unasked(start, strike, scenario)
    return _bad_end_asked(start, strike, scenario, around)


def _bad_end_by_itself(start: Start) -> str | None:
    code = start.exit_code
    if start.opened is None:
        return f"exit status {code}, and it never opened a SpotGuard"
    if not start.finished:
        return f"exit status {code} at step {start.last_step}, without a signal and before the end of training"
    return None if code == 0 else f"exit status {code} after the end of training"


def _bad_end_by_signal(start: Start, strike: Strike) -> str | None:
    code = start.exit_code
    if start.left_as_planned:
        return None
    if strike.kind == "SIGKILL":
        return f"exit status {code} after SIGKILL, -9 was expected"
    return _bad_status(start, strike)


def _bad_status(start: Start, strike: Strike) -> str:
    """It was to stop and to be started again."""
    code, kind = start.exit_code, strike.kind
    if start.stopped is not None:
        taken = "the work for done" if code == 0 else "it for a failure"
        return f"exit status {code} after {kind}, {start.stopped} was expected: a scheduler would take {taken}"
    what = "it went on to its end" if start.finished else f"exit status {code}, without a last checkpoint,"
    return f"{what} after {kind} at step {strike.step}; {_OWN_HANDLER}"


def _bad_end_unasked(start: Start, strike: Strike, scenario: Scenario) -> str | None:
    if start.stopped is None:
        return _bad_end_by_itself(start)
    if scenario.may_leave and _left_before(start, strike):
        return None if start.left_as_planned else _bad_status(start, strike)
    return f"it left after '{strike.kind}' at step {strike.step}, which asks nobody to go: training was to go on"


def _left_before(start: Start, strike: Strike) -> bool:
    """Whether it was on its way before it could know of the last news."""
    heard_at = strike.notices[-1].heard_at if strike.complete else None
    return start.stopping is not None and (heard_at is None or start.stopping < heard_at)


def _bad_end_asked(start: Start, strike: Strike, scenario: Scenario, around: Circumstances) -> str | None:
    dropped = next((done.trouble for done in strike.delivered if done.trouble), "")
    if dropped:
        return (
            f"{strike.delivered[0].what}: {dropped}. The training heard nothing of it. Make it process 1, with 'exec python train.py', "
            "or start it below an init process that passes signals on"
        )
    if strike.asked_at is None and start.stopped is not None:
        return f"it left in the midst of '{strike.kind}', before it was told to go"
    if start.killed and scenario.lead_s == 0:
        return None
    if start.killed or start.exit_state == "unknown":
        return _too_late(start, strike, scenario, around)
    if start.finished and not scenario.asks_by_signal:
        return (
            f"the run came to its end {format_seconds(start.window_s or 0.0)} after '{strike.kind}' had told it to go, with time left. "
            "Ask for a smaller --grace, or train longer"
        )
    return None if start.left_as_planned else _bad_status(start, strike)


def _too_late(start: Start, strike: Strike, scenario: Scenario, around: Circumstances) -> str:
    given, asked_at = format_seconds(scenario.lead_s), strike.asked_at or strike.at
    what = f"killed after '{strike.kind}' at step {strike.step}"
    if start.stopped is not None and start.left is not None:
        return (
            f"{what}: it had stopped after {format_seconds(start.left - asked_at)}, and had still not ended when the {given} were over; "
            "what holds up its exit?"
        )
    heard_at = next((done.heard_at for done in strike.notices if done.at >= asked_at), None)
    if not scenario.asks_by_signal and heard_at is None:
        return (
            f"{what}: in the {given} nobody asked the metadata service. Does the script say notices='none'? "
            "If not, ask for a --grace that is longer than the time between two questions, which is 5 s on EC2"
        )
    heard_s = 0.0 if scenario.asks_by_signal or heard_at is None else heard_at - asked_at
    needed = heard_s + around.step_s + around.save_s
    if needed > scenario.lead_s:
        return (
            f"{what}: needed {format_seconds(needed)}, {given} given; a save took up to {format_seconds(around.save_s)}, "
            f"a step {format_seconds(around.step_s)}. {around.remedies}"
        )
    return (
        f"{what}: {given} were given, and {format_seconds(needed)} would have been enough. The script counts on more time, "
        f"or did not hear of it: look for grace= and SPOTGUARD_GRACE; {_OWN_HANDLER}"
    )


def remarks(start: Start, around: Circumstances) -> list[str]:
    """What to know of a start that ended well."""
    strike = start.strike
    scenario = strike.interruption.scenario if strike is not None else None
    if strike is None or scenario is None:
        return []
    told = []
    unheard = strike.notices and not scenario.asks_by_signal and all(done.heard_at is None for done in strike.notices)
    if unheard and scenario.trains_s:
        told.append(
            f"nobody asked the metadata service while it told of '{strike.kind}'. Does the script say notices='none'? "
            "If not, ask for a longer --grace: EC2 is asked every 5 s, Azure every second"
        )
    if scenario.asks_s is None and start.stopped is not None:
        told.append(f"it left before '{strike.kind}' had been told to it whole: that start need not have ended")
    if start.stopped is None or start.killed or not scenario.lead_s:
        return told
    if start.lost_steps and not start.committed_after_notice:
        told.append(
            f"after '{strike.kind}' nothing new was committed, and {start.lost_steps} steps had to be done again: a save took up to "
            f"{format_seconds(around.save_s)}, {format_seconds(scenario.lead_s)} were given. {around.remedies}"
        )
    return told
