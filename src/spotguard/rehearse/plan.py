"""Which interruptions, where: a pure function of the seed and of what the untouched run showed."""

import dataclasses
import itertools
import math
import random
from collections.abc import Mapping, Sequence
from signal import Signals
from typing import Any, Literal

from spotguard._time import format_seconds
from spotguard.checkpoint.layout import parse_manifest_key, parse_shard_key
from spotguard.errors import ConfigError
from spotguard.rehearse.scenario import Delivery, Scenario, Signal

__all__ = ["MANIFEST", "Interruption", "check_room", "plan_interruptions", "save_interval"]

Place = Literal["boundary", "write", "publish"]

MANIFEST = "manifest"
_PLACES: tuple[Place, ...] = ("boundary", "write", "publish")
_ROOM = 1.1  # of the steps that a scenario takes: the interrupted run may be quicker than the untouched one was
_SAVES = 12  # in the interrupted run, unless told otherwise: several between any two of the usual six interruptions


@dataclasses.dataclass(frozen=True)
class Interruption:
    """One interruption: a signal, or what a platform does.

    Attributes:
        kind: ``"SIGTERM"``, ``"SIGKILL"``, or the name of the scenario.
        step: Due as soon as the run gets there.
        place: At the ``"boundary"``; or in the first save from `step` on: when an object is half written (``"write"``), or when it is whole
            and not yet visible (``"publish"``).
        target: Which object of that save: the name of a shard, or ``"manifest"``. A shard that has not changed is not written; the manifest
            takes its place then.
        scenario: What the platform delivers from there on; None for a single signal.

    Example:
        >>> str(Interruption("SIGKILL", 120, "write", "model"))
        'SIGKILL (model half written), first save from step 120 on'
    """

    kind: str
    step: int
    place: Place = "boundary"
    target: str = ""
    scenario: Scenario | None = None

    @property
    def deliveries(self) -> tuple[Delivery, ...]:
        """What is delivered, and when."""
        if self.scenario is not None:
            return self.scenario.deliveries
        return (Delivery(0.0, Signal(Signals[self.kind], "guard")),)

    @property
    def goes_on(self) -> bool:
        """Whether the process is to outlive it."""
        return self.scenario is not None and self.scenario.asks_s is None

    def strikes(self, message: Mapping[str, Any]) -> bool:
        """Whether this message of the guard says that the process is at the place."""
        if message["at"] != self.place:
            return False
        if self.place == "boundary":
            return bool(message["step"] >= self.step)
        key = str(message["key"])
        if (identity := parse_manifest_key(key)) is not None:
            return identity.step >= self.step  # the last object of a save: whatever the target was, it has not come up
        identity = parse_shard_key(key)
        return identity is not None and identity.step >= self.step and _shard_name(key) == self.target

    @property
    def where(self) -> str:
        """The place, in words."""
        return place_in_words(self.place, self.target)

    def __str__(self) -> str:
        when = f"step {self.step}" if self.place == "boundary" else f"first save from step {self.step} on"
        return f"{self.kind} ({self.where}), {when}"


def plan_interruptions(
    total_steps: int,
    *,
    seed: int,
    sigterm: int,
    sigkill: int,
    shards: Sequence[str] = (),
    scenarios: Sequence[Scenario] = (),
    steps_per_s: float = 0.0,
) -> tuple[Interruption, ...]:
    """Spread interruptions over a run: one at a random step of each of so many equal stretches, in random order.

    SIGKILLs take turns between boundaries, objects half written, and objects whole but not yet visible. Behind a scenario in which training
    goes on for a while come that many steps in which nothing else begins.

    Args:
        total_steps: Steps of the untouched run.
        seed: The same seed gives the same plan.
        sigterm: How many SIGTERMs.
        sigkill: How many SIGKILLs.
        shards: Names of the shards of a checkpoint.
        scenarios: What a platform does, each once.
        steps_per_s: How fast the untouched run was.

    Returns:
        In the order of their steps, each step from 1 to ``total_steps - 1``.

    Raises:
        ConfigError: Nothing to do, or more interruptions than steps to have them at.

    Example:
        >>> [str(item) for item in plan_interruptions(100, seed=1, sigterm=1, sigkill=1)]
        ['SIGKILL (manifest half written), first save from step 9 on', 'SIGTERM (boundary), step 86']
    """
    check_counts(sigterm, sigkill, len(scenarios))
    count = sigterm + sigkill + len(scenarios)
    free = total_steps - sum(_room(one, steps_per_s) for one in scenarios)
    if count > free - 1:
        raise ConfigError(
            f"the run takes {total_steps} steps, too few for {count} interruptions; "
            "ask for fewer with --sigterm and --sigkill, or train longer"
        )
    rng = random.Random(seed)
    edges = [1 + (free - 1) * index // count for index in range(count + 1)]
    steps = [rng.randrange(low, high) for low, high in itertools.pairwise(edges)]
    kinds: list[Scenario | str] = [*scenarios, *["SIGTERM"] * sigterm, *["SIGKILL"] * sigkill]
    rng.shuffle(kinds)
    turns = rng.sample(_PLACES, len(_PLACES))
    places = iter([turns[index % len(turns)] for index in range(sigkill)])
    plan, taken = [], 0
    for kind, step in zip(kinds, steps, strict=True):
        if isinstance(kind, Scenario):
            plan.append(Interruption(kind.name, step + taken, scenario=kind))
            taken += _room(kind, steps_per_s)
            continue
        place = next(places) if kind == "SIGKILL" else "boundary"
        target = "" if place == "boundary" else rng.choice([*shards, MANIFEST])
        plan.append(Interruption(kind, step + taken, place, target))
    return tuple(plan)


def _room(scenario: Scenario, steps_per_s: float) -> int:
    return math.ceil(_ROOM * scenario.trains_s * steps_per_s)


def check_room(scenarios: Sequence[Scenario], *, train_s: float, grace_s: float, least_s: float) -> None:
    """Refuse to rehearse notices that are longer than the run.

    Args:
        scenarios: Each of them once.
        train_s: Seconds that the untouched run has trained.
        grace_s: What the scenarios were made for.
        least_s: The shortest grace in which a notice of that platform is heard at all.

    Raises:
        ConfigError: Tells which grace would fit.
    """
    needed = _ROOM * sum(one.trains_s for one in scenarios)
    if needed <= train_s:
        return
    fits = math.floor(grace_s * train_s / needed)
    less = f"ask for a smaller --grace, such as --grace {fits}s, or " if fits >= least_s else ""
    raise ConfigError(
        f"the untouched run trained for {format_seconds(train_s)}. With a grace of {format_seconds(grace_s)} the notices take "
        f"{format_seconds(needed)} of training, and what comes later would not be seen: {less}train longer"
    )


def check_counts(sigterm: int, sigkill: int, scenarios: int = 0) -> None:
    """Refuse a rehearsal of nothing."""
    if sigterm < 0 or sigkill < 0 or sigterm + sigkill + scenarios == 0:
        raise ConfigError(
            f"sigterm={sigterm}, sigkill={sigkill}: a rehearsal without interruptions proves nothing; ask for at least one"
        )


def save_interval(total_steps: int, every: int | None) -> int:
    """Steps between saves in the interrupted run: the script's own may be longer than the whole rehearsal.

    Example:
        >>> save_interval(540, None), save_interval(540, 100), save_interval(5, None)
        (45, 100, 1)
    """
    return every if every is not None else max(1, total_steps // _SAVES)


def place_in_words(place: str, target: str) -> str:
    """Where in the loop or in a save, for people."""
    if place == "write":
        return f"{target} half written"
    if place == "publish":
        return f"{target} not yet visible"
    return "boundary"


def object_name(key: str) -> str:
    """Name of the shard, or ``"manifest"``, that stands under a key."""
    return MANIFEST if parse_manifest_key(key) is not None else _shard_name(key)


def _shard_name(key: str) -> str:
    return key.rpartition("/")[2].removesuffix(".pt")
