"""What spotguard writes as JSON: the run, the claim of an attempt, the manifest of a checkpoint, and how an attempt ended.

Each is canonical JSON (UTF-8, keys sorted, no white space) that carries a digest of itself, so that one flipped bit anywhere in the
file is found: the bytes must be exactly what encoding the parsed record would give, and the digest must agree.
"""

import datetime as dt
import hashlib
import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_serializer

from spotguard.checkpoint.layout import CheckpointId
from spotguard.errors import CheckpointDamagedError, ConfigError, FormatTooNewError

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["FORMAT", "Claim", "ExitRecord", "Manifest", "Record", "RunRecord", "ShardRecord", "as_metrics"]

FORMAT = 1
"""Version of the layout and of the records. A higher one in a store is refused, never guessed at."""


def as_metrics(metrics: Mapping[str, float] | None) -> dict[str, float]:
    """What the caller of a save gives to choose by, as a manifest takes it.

    Raises:
        ConfigError: It is no mapping of names to numbers.

    Example:
        >>> as_metrics({"val_loss": 1})
        {'val_loss': 1.0}
    """
    try:
        return {str(name): float(value) for name, value in dict(metrics or {}).items()}
    except (TypeError, ValueError) as error:
        raise ConfigError(f"save(metrics={metrics!r}): write names and numbers, as in {{'val_loss': 0.3}}") from error


def _canonical(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


class Record(BaseModel):
    """Base of the records: frozen, closed, and able to tell whether its bytes are intact."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    what: ClassVar[str] = "record"
    added: ClassVar[frozenset[str]] = frozenset()
    """Fields that the format got later: left out where they are None, so that older records are canonical too."""
    format: int = FORMAT

    def to_bytes(self) -> bytes:
        """Canonical JSON with a ``sha256`` over everything else in it."""
        fields = json.loads(self.model_dump_json())  # which writes NaN, a metric like any other, as a string
        fields = {name: value for name, value in fields.items() if value is not None or name not in self.added}
        return _canonical({**fields, "sha256": hashlib.sha256(_canonical(fields)).hexdigest()})

    @classmethod
    def from_bytes(cls, data: bytes, *, key: str) -> "Self":
        """Parse and verify.

        Args:
            data: The whole object.
            key: Where it was read, for the message.

        Raises:
            CheckpointDamagedError: Not the bytes that `to_bytes` wrote.
            FormatTooNewError: Written by a later release.
        """
        try:
            fields = json.loads(data)
            if not isinstance(fields, dict):
                raise TypeError("not a JSON object")
            found, claimed = fields.get("format"), fields.pop("sha256", None)
            if isinstance(found, int) and found > FORMAT and claimed == hashlib.sha256(_canonical(fields)).hexdigest():
                raise FormatTooNewError(
                    f"{key} has format {found}; this release reads up to {FORMAT}. Upgrade spotguard, or use a new URI"
                )
            record = cls.model_validate(fields)
        except (ValueError, TypeError, RecursionError, ValidationError) as error:
            raise CheckpointDamagedError(f"{key} is not a whole {cls.what}: {_first_line(error)}") from error
        if record.to_bytes() != data:
            raise CheckpointDamagedError(f"{key} is damaged: its bytes do not match its own digest")
        return record


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


class RunRecord(Record):
    """Identity of a run, written once."""

    what: ClassVar[str] = "run record"
    run_id: str
    created_at: dt.datetime
    spotguard: str


class Claim(Record):
    """One start of the job. The next one reads it to know which history it continues.

    Attributes:
        attempt: Its number, taken by an exclusive create.
        parent: The attempt whose history this one continues; None for a fresh run.
        parent_max_step: Only checkpoints of that history up to this step belong to this attempt's lineage.
        parent_max_sequence: And of those that `parent` has at this very step only those up to this sequence; None: all.
        reason: "start", or "rollback".
    """

    what: ClassVar[str] = "claim"
    added: ClassVar[frozenset[str]] = frozenset({"parent_max_sequence"})
    attempt: int = Field(ge=1)
    parent: int | None = None
    parent_max_step: int | None = None
    parent_max_sequence: int | None = None
    reason: str = "start"
    host: str = ""
    pid: int = 0
    created_at: dt.datetime


class ExitRecord(Record):
    """How an attempt ended: for whoever starts the next one, where the exit status does not tell. torchrun ends with 1 after any signal.

    The only record that is written anew, by each attempt; one of an older attempt says nothing of a later one.

    Attributes:
        attempt: Which one.
        state: ``"preempted"``: there is work left, start it again. ``"finished"``: there is none. ``"failed"``: an exception ended it.
        step: Step boundaries passed.
        checkpoint: What the next start resumes from; None when there is nothing.
        notice: What stopped it.
        detail: Why the last checkpoint is not newer, or what failed.
        exit_code: Exit status that the process ends with, where that is ours to choose.
    """

    what: ClassVar[str] = "exit record"
    attempt: int
    state: Literal["preempted", "finished", "failed"]
    step: int
    checkpoint: str | None = None
    notice: str | None = None
    detail: str = ""
    exit_code: int | None = None
    host: str = ""
    at: dt.datetime


class ShardRecord(BaseModel):
    """One object of a checkpoint.

    Attributes:
        name: The member it holds, or ``rank-00000``.
        key: Where it stands; a key of an older checkpoint when nothing had changed since.
        size: Bytes.
        digest: See `spotguard.checkpoint.digest`.
        version: Version id, in a store that has versions.
        rank: The rank it belongs to; None for what is the same on every rank.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    key: str
    size: int = Field(ge=0)
    digest: str
    version: str | None = None
    rank: int | None = None


class Manifest(Record):
    """The commit: a checkpoint exists if and only if its manifest does.

    Attributes:
        run_id: The run it belongs to.
        attempt: The start that wrote it.
        step: Step boundaries passed.
        sequence: Counts commits at one step.
        epoch: Epoch that goes on from here, from 0.
        batch: Batches of that epoch that are done.
        world_size: Ranks that took part.
        finished: The loop had come to its end.
        parent: Id of the checkpoint committed before this one in the same history.
        metrics: What the caller wants to choose by, such as ``val_loss``.
        libraries: Versions of python, torch, numpy and spotguard that wrote it.
        created_at: Wall-clock time, for people; never used for order.
        shards: Every object, with digest.
    """

    what: ClassVar[str] = "manifest"
    run_id: str
    attempt: int = Field(ge=1)
    step: int = Field(ge=0)
    sequence: int = Field(default=0, ge=0)
    epoch: int = Field(default=0, ge=0)
    batch: int = Field(default=0, ge=0)
    world_size: int = Field(default=1, ge=1)
    finished: bool = False
    parent: str | None = None
    metrics: dict[str, float] = {}
    libraries: dict[str, str] = {}
    created_at: dt.datetime
    shards: tuple[ShardRecord, ...]

    @field_serializer("metrics", when_used="json")
    def _metrics_to_json(self, metrics: dict[str, float]) -> dict[str, float | str]:
        """JSON has no NaN and no infinity, and a loss that has become NaN must not make the save fail: they are written as text."""
        return {name: value if math.isfinite(value) else str(value) for name, value in metrics.items()}

    @property
    def id(self) -> CheckpointId:
        """The checkpoint that this manifest commits."""
        return CheckpointId(self.attempt, self.step, self.sequence)

    @property
    def size(self) -> int:
        """Bytes of all shards."""
        return sum(shard.size for shard in self.shards)
