"""What a rehearsal found, and whether that is safe."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from spotguard.notices.platforms import Layer
from spotguard.rehearse.outcome import GENERATORS, Compared
from spotguard.rehearse.plan import Interruption
from spotguard.rehearse.record import Spent, Start, Strike
from spotguard.rehearse.scenario import in_words
from spotguard.rehearse.slow_store import SlowStore
from spotguard.rehearse.verdict import Circumstances, bad_end, remarks

__all__ = ["HOPELESS", "Report", "Verdict", "judge", "unlike", "unlike_generators"]

Verdict = Literal["safe", "unsafe", "inconclusive"]

HOPELESS = frozenset({"torch", "cuda"})
"""Generators that initial weights, shuffling and dropout draw from: without these alike, nothing is."""

_SEED_REMEDY = {
    "torch": "torch.manual_seed(0)",
    "cuda": "torch.manual_seed(0)",
    "python": "random.seed(0)",
    "numpy": "numpy.random.seed(0)",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """A rehearsal, whole.

    Attributes:
        command: What was started.
        seed: Repeats the plan.
        every: Steps between saves in the interrupted run.
        verdict: ``"safe"``; ``"unsafe"``; or ``"inconclusive"`` where the script itself is not the same twice.
        reasons: Why it is not safe; empty when it is.
        notes: What else a user should know.
        untouched: The run that was left alone: one start.
        interrupted: The starts of the other run.
        plan: The interruptions, delivered or not.
        members: The final checkpoints, compared.
        output: Directory with the page and the logs.
        platform: Whose interruptions these were; None for single signals.
        grace_s: Seconds that the platform gave.
        slow_store: How slow writing was made.
    """

    command: tuple[str, ...]
    seed: int
    every: int
    verdict: Verdict
    reasons: tuple[str, ...]
    notes: tuple[str, ...]
    untouched: Start
    interrupted: tuple[Start, ...]
    plan: tuple[Interruption, ...]
    members: tuple[Compared, ...]
    output: Path
    platform: str | None = None
    grace_s: float | None = None
    slow_store: SlowStore | None = None

    @property
    def safe(self) -> bool:
        """Whether the exit status is 0."""
        return self.verdict == "safe"

    @property
    def interruptions(self) -> tuple[Strike, ...]:
        """Those that came to pass."""
        return tuple(strike for start in self.interrupted for strike in start.strikes)

    @property
    def lost_steps(self) -> int:
        """Steps that had to be done again."""
        return sum(start.lost_steps for start in self.interrupted)

    @property
    def stall_s(self) -> float:
        """Seconds of all snapshots."""
        return sum(sum(start.stalls) for start in self.interrupted)

    @property
    def restore_s(self) -> float:
        """Seconds of all restores."""
        return sum(start.restore_s for start in self.interrupted)

    @property
    def wall_s(self) -> float:
        """Seconds from the first start of the interrupted run to the end of the last."""
        return self.interrupted[-1].ended if self.interrupted else 0.0

    @property
    def spent(self) -> Spent:
        """Where the time of the interrupted run went."""
        return sum((start.spent for start in self.interrupted), Spent())

    @property
    def identical(self) -> bool:
        """Whether everything that was compared is the same, bit for bit."""
        return bool(self.members) and all(member.identical is not False for member in self.members)

    def to_json(self) -> str:
        """For programs."""
        fields: dict[str, Any] = dataclasses.asdict(self)
        for start, record in zip(
            [fields["untouched"], *fields["interrupted"]], [self.untouched, *self.interrupted], strict=True
        ):
            for name in ("boundaries", "waits"):
                del start[name]
            start["spent"] = dataclasses.asdict(record.spent)
            for told, strike in zip(start["strikes"], record.strikes, strict=True):
                told["interruption"] = _plain(strike.interruption)
            for name in ("window_s", "trained_in_window_s", "committed_after_notice"):
                start[name] = getattr(record, name)
        fields["plan"] = [_plain(item) for item in self.plan]
        totals = {
            name: getattr(self, name) for name in ("safe", "identical", "lost_steps", "stall_s", "restore_s", "wall_s")
        }
        return json.dumps({**totals, **fields}, indent=2, default=str)


def _plain(interruption: Interruption) -> dict[str, Any]:
    fields = dataclasses.asdict(interruption)
    if interruption.scenario is not None:
        told = [{"at_s": delivery.at_s, "what": in_words(delivery.act)} for delivery in interruption.deliveries]
        fields["scenario"]["deliveries"] = told
    return fields


def judge(
    untouched: Start,
    interrupted: Sequence[Start],
    plan: Sequence[Interruption],
    members: Sequence[Compared],
    *,
    layer: Layer | None = None,
) -> tuple[Verdict, tuple[str, ...], tuple[str, ...]]:
    """Decide.

    Args:
        untouched: The run that was left alone.
        interrupted: The starts of the other.
        plan: The interruptions, delivered or not.
        members: The final checkpoints, compared.
        layer: What is known of the platform; None for single signals.

    Returns:
        The verdict, the reasons why it is not safe, and notes.
    """
    unseeded = unlike_generators(untouched, interrupted)
    if HOPELESS & set(unseeded):
        what = " and ".join(unseeded)
        reason = f"two fresh starts of the script began with different {what} generators, so they cannot be compared; {_remedy(unseeded)}"
        return "inconclusive", (reason,), ()
    around = Circumstances(
        layer,
        save_s=max((seconds for start in (untouched, *interrupted) for seconds in start.saves), default=0.0),
        step_s=max(start.step_s for start in (untouched, *interrupted)),
    )
    bad = _bad_starts(untouched, interrupted, around)
    reasons, notes = list(bad), _notes(interrupted, around)
    last = interrupted[-1]
    if not bad:
        missing = len(plan) - sum(
            strike.complete or not (strike.interruption.goes_on and start.finished)
            for start in interrupted
            for strike in start.strikes
        )
        if missing:
            reasons.append(f"{missing} of {len(plan)} interruptions did not come to pass: the run ended before")
        if last.last_step != untouched.last_step:
            reasons.append(f"the untouched run took {untouched.last_step} steps, the interrupted one {last.last_step}")
    different = [member for member in members if member.identical is False]
    if different:
        first = different[0]
        reasons.append(
            f"{len(different)} of {len(members)} parts of the final state differ, first {first.name}: {first.difference}. "
            "Something that training depends on is not in TrainState, or is not the same in every start of the script"
        )
    unused = {member.name.removeprefix(GENERATORS) for member in members if member.unused}
    drawn = [name for name in unseeded if name not in unused]
    if drawn and different:
        what = " and ".join(drawn)
        reasons.append(
            f"two fresh starts began with different {what} generators, and training drew from them; {_remedy(drawn)}"
        )
    elif drawn and members:
        notes.append(
            f"the script does not seed {' and '.join(drawn)}, left out of the comparison; to include it, {_remedy(drawn)}"
        )
    if not reasons:
        return "safe", (), tuple(notes)
    return ("inconclusive" if drawn and different and not bad else "unsafe"), tuple(reasons), tuple(notes)


def _remedy(unseeded: Sequence[str]) -> str:
    lines = sorted({_SEED_REMEDY[name] for name in unseeded if name in _SEED_REMEDY})
    return f"put {', '.join(lines)} at the top of the script"


def unlike_generators(untouched: Start, interrupted: Sequence[Start]) -> tuple[str, ...]:
    """Generators that were not in the same state at every fresh start of the script."""
    found = set[str]()
    for start in interrupted:
        if start.fresh is not None:
            found |= unlike(start.fresh, untouched)
    return tuple(sorted(found))


def unlike(rng: Mapping[str, str], start: Start) -> set[str]:
    """Generators that are not in the state that they had when that start began."""
    ours = start.fresh or {}
    return {name for name in {*ours, *rng} if ours.get(name) != rng.get(name)}


def _notes(interrupted: Sequence[Start], around: Circumstances) -> list[str]:
    return [
        f"start {start.number}: {note}" for start in interrupted for note in (*start.troubles, *remarks(start, around))
    ]


def _bad_starts(untouched: Start, interrupted: Sequence[Start], around: Circumstances) -> list[str]:
    reasons = []
    for start in interrupted:
        if (reason := bad_end(start, around)) is not None:
            reasons.append(f"start {start.number}: {reason} (see {start.log})")
        if start.opened is not None and start.uri != untouched.uri:
            reasons.append(
                f"start {start.number} opened {start.uri}, the untouched run {untouched.uri}: a restart would not find its checkpoints. "
                "Give SpotGuard the same place at every start, without a date or a process number in it"
            )
    return reasons
