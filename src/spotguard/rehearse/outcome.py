"""Are the final checkpoints of two runs the same, bit for bit, member by member?"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from spotguard.checkpoint import Manifest, ShardRecord
from spotguard.checkpoint.layout import rank_name
from spotguard.pipeline.checkpoint import Checkpoint, fetch_shard
from spotguard.pipeline.checkpoint_store import CheckpointStore
from spotguard.state.codec import decode
from spotguard.state.compare import fingerprint, first_difference

__all__ = ["Compared", "compare_checkpoints", "final_checkpoint"]

GENERATORS = "random generators: "
_RANK = rank_name(0)
_PARTS = {
    "data": "data position",
    "logged": "what was logged",
    "modes": "modes of modules",
    "trainer": "state of the trainer",
}


@dataclasses.dataclass(frozen=True)
class Compared:
    """One member of the two final checkpoints.

    Attributes:
        name: Of the member, or what of the rest of the state.
        identical: None for what was left out of the comparison.
        difference: The first one, or why it was left out.
        size: Bytes of its shard in the untouched run; 0 where it has none of its own.
        unused: A generator that was left out, and from which nothing had been drawn since the start.
    """

    name: str
    identical: bool | None
    difference: str = ""
    size: int = 0
    unused: bool = False


def final_checkpoint(store: Path) -> Checkpoint:
    """The checkpoint that a run ended with.

    Raises:
        CheckpointError: There is none, or it does not verify.
    """
    resolution = CheckpointStore(store).resolve()
    checkpoint = resolution.require()
    assert checkpoint is not None, "its guard said that it was committed"
    return checkpoint


def compare_checkpoints(
    left: Checkpoint, right: Checkpoint, *, leave_out: Mapping[str, str] | None = None
) -> tuple[Compared, ...]:
    """Compare member by member, one in memory at a time.

    Args:
        left: Of the untouched run.
        right: Of the interrupted run.
        leave_out: Generators that were not alike at the beginning, so that nothing can be said about their end, with the fingerprint
            that each had then in the untouched run.
    """
    return tuple(_compare(left, right, leave_out or {}))


def _compare(left: Checkpoint, right: Checkpoint, leave_out: Mapping[str, str]) -> Iterator[Compared]:
    ours, theirs = _shards(left.manifest), _shards(right.manifest)
    for name in sorted({*ours, *theirs} - {_RANK}):
        if name not in ours or name not in theirs:
            yield Compared(
                name, identical=False, difference=f"only in the {'untouched' if name in ours else 'interrupted'} run"
            )
        else:
            difference = first_difference(_read(left, ours[name]), _read(right, theirs[name]))
            yield Compared(name, difference is None, difference or "", ours[name].size)
    yield from _compare_rest(_read(left, ours[_RANK]), _read(right, theirs[_RANK]), leave_out)


def _compare_rest(left: dict[str, Any], right: dict[str, Any], leave_out: Mapping[str, str]) -> Iterator[Compared]:
    for name in sorted({*left["rng"], *right["rng"]}):
        title = f"{GENERATORS}{name}"
        if name in leave_out:
            unused = fingerprint(left["rng"].get(name)) == leave_out[name]
            reason = "not seeded by the script" + (", and nothing drew from it" if unused else "")
            yield Compared(title, None, reason, unused=unused)
            continue
        difference = first_difference({name: left["rng"].get(name)}, {name: right["rng"].get(name)})
        yield Compared(title, difference is None, difference or "")
    for tree in (left, right):
        for data in tree["data"] if isinstance(tree["data"], list) else [tree["data"]]:
            _forget(data, leave_out)
    for part in sorted({*left, *right} - {"rng", "clocks"}):
        difference = first_difference(left.get(part), right.get(part))
        yield Compared(_PARTS.get(part, part), difference is None, difference or "")


def _forget(data: dict[str, Any], leave_out: Mapping[str, str]) -> None:
    """An open pass over a loader remembers the generators as they were at its start, and at its first draw."""
    if data["open"] is not None:
        start = data["open"]["start"]
        for name in leave_out:
            start["rng"].pop(name, None)
            if start["drawing"] is not None:
                start["drawing"][0].pop(name, None)


def _shards(manifest: Manifest) -> dict[str, ShardRecord]:
    return {shard.name: shard for shard in manifest.shards}


def _read(checkpoint: Checkpoint, shard: ShardRecord) -> Any:
    return decode(fetch_shard(checkpoint.store, shard), key=shard.key)
