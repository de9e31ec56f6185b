"""Writes down what one start of the script does, as its guard tells it."""

import dataclasses
from collections.abc import Iterator, Sequence
from signal import SIGKILL
from typing import Any

from spotguard.checkpoint.layout import parse_manifest_key, parse_shard_key
from spotguard.rehearse.plan import Interruption, object_name, place_in_words
from spotguard.rehearse.record import Delivered, Message, Start, Strike
from spotguard.rehearse.scenario import Announce, Begin, Delivery, Freeze, Kill, Signal, Withdraw, in_words

__all__ = ["Recorder"]

_KINDS: dict[type, str] = {
    **dict.fromkeys([Announce, Begin, Withdraw], "notice"),
    Signal: "sigterm",
    Freeze: "frozen",
    Kill: "sigkill",
}


class Recorder:
    """Listens to the messages of one start.

    Args:
        number: Of the start.
        began: When it was started.
    """

    def __init__(self, number: int, began: float) -> None:
        self._fields: dict[str, Any] = {"number": number, "began": began}
        self._uris: set[str] = set()
        self._boundaries: list[tuple[int, float]] = []
        self._waits: list[tuple[float, float]] = []
        self._commits: list[tuple[float, int]] = []
        self._stalls: list[float] = []
        self._begun: dict[int, float] = {}
        self._strikes: list[Strike] = []

    @property
    def step(self) -> int:
        """The last one heard of."""
        if "last_step" in self._fields:
            return int(self._fields["last_step"])
        return self._boundaries[-1][0] if self._boundaries else int(self._fields.get("first_step", 0))

    @property
    def strikes(self) -> Sequence[Strike]:
        """What has befallen it up to now."""
        return self._strikes

    def heard(self, message: Message, now: float) -> None:
        """Take a message that is going to be answered."""
        at, fields = message["at"], self._fields
        if at == "hello":
            fields.setdefault("uri", str(message["uri"]))
            self._uris.add(str(message["uri"]))
            fields.setdefault("opened", now)
        elif at in ("fresh", "resumed"):
            fields.setdefault("ready", now)
            fields["fresh"] = message.get("rng")
            fields["first_step"] = message.get("step", 0)
            fields["resumed_from"] = message.get("checkpoint")
            fields["restore_s"] = message.get("seconds", 0.0)
            fields["troubles"] = (*message.get("rejected", ()), *message.get("inexact", ()))
        elif at == "boundary":
            self._boundaries.append((int(message["step"]), now))
        elif at == "snapshot":
            self._stalls.append(float(message["stall"]))
            self._began_to_save(int(message["step"]), now - float(message["stall"]))
            self._waits.append((now - float(message["stall"]), now))
        elif at == "write" and (shard := parse_shard_key(message["key"])) is not None:
            self._began_to_save(shard.step, now)  # a small one is there before the loop has told of its snapshot
        elif at == "published" and (identity := parse_manifest_key(message["key"])) is not None:
            self._commits.append((now, identity.step))
        elif at == "stopped":
            fields["stopped"], fields["left"] = int(message.get("code", 143)), now
            fields["stopping"] = now - float(message["seconds"])
            self._waits.append((fields["stopping"], now))
        elif at == "finished":
            fields["finished"], fields["left"], fields["last_step"] = True, now, int(message["step"])
            last = self._boundaries[-1][1] if self._boundaries else now
            if self._waits and self._waits[-1][1] > last:  # the save at the end, which is waited for
                self._waits.append((self._waits[-1][0], now))

    def strike(self, interruption: Interruption, message: Message, now: float) -> None:
        """An interruption begins at this message."""
        name = object_name(message["key"]) if "key" in message else ""
        where = place_in_words(interruption.place, name)
        self._strikes.append(Strike(interruption, now, self.step, where))

    def delivered(self, delivery: Delivery, trouble: str, now: float) -> None:
        """What it consists of is on its way."""
        act = delivery.act
        if isinstance(act, Kill):
            self._fields.setdefault("killed_at", now)
        done = Delivered(now, in_words(act), _KINDS[type(act)], trouble)
        if isinstance(act, Signal) and act.number == SIGKILL:
            done = dataclasses.replace(done, kind="sigkill")
        last = self._strikes[-1]
        self._strikes[-1] = dataclasses.replace(last, delivered=(*last.delivered, done))

    def _began_to_save(self, step: int, when: float) -> None:
        self._begun[step] = min(when, self._begun.get(step, when))

    def result(
        self,
        *,
        ended: float,
        exit_code: int,
        timed_out: bool,
        log: str,
        heard: Sequence[float | None] = (),
        exit_state: str | None = None,
    ) -> Start:
        """All of it, once the process is gone.

        Args:
            ended: When it was.
            exit_code: As `subprocess` has it.
            timed_out: It was killed because it did not end.
            log: Name of the file with its output.
            heard: Of each piece of news of the metadata service, in order, when somebody heard of it.
            exit_state: See `Start`.
        """
        fields = {**self._fields, "last_step": self.step, "exit_state": exit_state}
        told = iter(heard)
        return Start(
            **fields,
            ended=ended,
            exit_code=exit_code,
            timed_out=timed_out,
            uris=len(self._uris),
            strikes=tuple(_with_ears(strike, told) for strike in self._strikes),
            saves=tuple(at - self._begun[step] for at, step in self._commits if step in self._begun),
            commits=tuple(self._commits),
            stalls=tuple(self._stalls),
            boundaries=tuple(self._boundaries),
            waits=tuple(self._waits),
            log=log,
        )


def _with_ears(strike: Strike, heard: Iterator[float | None]) -> Strike:
    told = [
        dataclasses.replace(done, heard_at=next(heard, None)) if done.kind == "notice" else done
        for done in strike.delivered
    ]
    return dataclasses.replace(strike, delivered=tuple(told))
