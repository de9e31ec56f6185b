"""Where things stand in a store: every key is made and read here, and nowhere else.

::

    run.json                                    identity of the run
    attempts/0004.json                          claim of one start
    checkpoints/0004-0000001200/model.pt        shards; Lightning's is one model.ckpt
    checkpoints/0004-0000001200/rank-00000.pt   what differs by rank
    manifests/0004-0000001200.json              the commit
    events/0004-rank-00000.jsonl                what happened
    exit.json                                   how the last attempt ended that could say so
    stop                                        a request to stop, removed by the guard that honours it
"""

import re
from typing import NamedTuple

from spotguard.errors import ConfigError

__all__ = [
    "ATTEMPTS",
    "CHECKPOINTS",
    "EVENTS",
    "EXIT",
    "MANIFESTS",
    "RUN",
    "STOP",
    "CheckpointId",
    "attempt_of_key",
    "check_member_name",
    "claim_key",
    "event_key",
    "parse_claim_key",
    "parse_manifest_key",
    "parse_shard_key",
    "rank_name",
]

RUN = "run.json"
STOP = "stop"
EXIT = "exit.json"
ATTEMPTS, CHECKPOINTS, MANIFESTS, EVENTS = "attempts/", "checkpoints/", "manifests/", "events/"

_ID = r"((\d{4,})-(\d{10,})(?:\.(\d+))?)"
_MANIFEST_KEY = re.compile(rf"{MANIFESTS}{_ID}\.json")
_SHARD_KEY = re.compile(rf"{CHECKPOINTS}{_ID}/[A-Za-z0-9_-]+\.(?:pt|ckpt)")
_CLAIM_KEY = re.compile(rf"{ATTEMPTS}(\d{{4,}})\.json")
_ANY_ATTEMPT = re.compile(rf"(?:{ATTEMPTS}|{CHECKPOINTS}|{MANIFESTS}|{EVENTS})(\d{{4,}})[.-]")
_MEMBER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")


class CheckpointId(NamedTuple):
    """Name of a checkpoint; the order of ids is the order of commits within a lineage.

    Attributes:
        attempt: The start of the job that wrote it.
        step: Step boundaries passed when it was taken.
        sequence: 0, or 1, 2, ... for further commits at the same step (at the end of an epoch, say).

    Example:
        >>> str(CheckpointId(4, 1200)), CheckpointId.parse("0004-0000001200.1")
        ('0004-0000001200', CheckpointId(attempt=4, step=1200, sequence=1))
    """

    attempt: int
    step: int
    sequence: int = 0

    def __str__(self) -> str:
        return f"{self.attempt:04d}-{self.step:010d}" + (f".{self.sequence}" if self.sequence else "")

    @classmethod
    def parse(cls, text: str) -> "CheckpointId":
        """Read an id as printed by `str`; raises ConfigError for anything else."""
        identity = _read_id(re.fullmatch(_ID, text))
        if identity is None:
            raise ConfigError(f"{text!r} is not a checkpoint id; ids look like '0004-0000001200' (see 'spotguard ls')")
        return identity

    @property
    def manifest_key(self) -> str:
        """Key of the manifest whose existence is the existence of the checkpoint."""
        return f"{MANIFESTS}{self}.json"

    def shard_key(self, name: str) -> str:
        """Key of the shard that holds one member, or what belongs to one rank; a name may bring an extension of its own."""
        return f"{CHECKPOINTS}{self}/{name}" + ("" if "." in name else ".pt")


def _read_id(match: re.Match[str] | None) -> CheckpointId | None:
    """The id that was matched. Another way to write the same numbers is a foreign name: two keys must not name one checkpoint."""
    identity = CheckpointId(int(match[2]), int(match[3]), int(match[4] or 0)) if match else None
    return identity if match and str(identity) == match[1] else None


def claim_key(attempt: int) -> str:
    """Key of the claim of an attempt."""
    return f"{ATTEMPTS}{attempt:04d}.json"


def event_key(attempt: int, rank: int, segment: int = 0) -> str:
    """Key of one segment of the event log of one rank."""
    return f"{EVENTS}{attempt:04d}-rank-{rank:05d}" + (f".{segment}" if segment else "") + ".jsonl"


def rank_name(rank: int) -> str:
    """Shard name of what belongs to one rank."""
    return f"rank-{rank:05d}"


def parse_manifest_key(key: str) -> CheckpointId | None:
    """The id whose manifest this key is, or None for a key that is not ours."""
    return _read_id(_MANIFEST_KEY.fullmatch(key))


def parse_shard_key(key: str) -> CheckpointId | None:
    """The id under which this shard was written, or None for a key that is not ours."""
    return _read_id(_SHARD_KEY.fullmatch(key))


def parse_claim_key(key: str) -> int | None:
    """The attempt that this key claims, or None for a key that is not ours."""
    match = _CLAIM_KEY.fullmatch(key)
    return int(match[1]) if match and claim_key(int(match[1])) == key else None


def attempt_of_key(key: str) -> int | None:
    """The attempt that any key of ours belongs to, partial objects included; None for a key that is not ours."""
    match = _ANY_ATTEMPT.match(key)
    return int(match[1]) if match else None


def check_member_name(name: str) -> None:
    """Refuse a member name that could not be the name of a shard."""
    if not _MEMBER.fullmatch(name):
        raise ConfigError(
            f"member name {name!r} cannot name a shard; use up to 100 of A-Z, a-z, 0-9 and _, not starting with a digit"
        )
