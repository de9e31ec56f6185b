"""A run to be harmed: small, deterministic, with everything in it that retention and repeated shards can get wrong."""

import datetime as dt
import functools
import os
import re
import shutil
import signal
import traceback
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from spotguard.checkpoint import CheckpointId, Manifest
from spotguard.checkpoint.layout import CHECKPOINTS, MANIFESTS, parse_manifest_key, parse_shard_key
from spotguard.events import Event
from spotguard.pipeline.checkpoint import Checkpoint, load_manifest
from spotguard.pipeline.history import claim_attempt, open_run
from spotguard.pipeline.objects import read_object
from spotguard.pipeline.resolver import Resolution, resolve
from spotguard.pipeline.writer import Writer
from spotguard.policies import KeepNewest
from spotguard.state.snapshot import HostBuffers, ShardImage, Snapshot
from spotguard.stores import LocalObjectStore, ObjectStore
from spotguard.stores.posix import Posix
from spotguard.testing.faults import Unsynced

KEEP = 2
LOST = 40  # the step of a save that died
WHEN = dt.datetime(2026, 1, 1, tzinfo=dt.timezone.utc)

FOREIGN = {
    "notes.txt": b"mine",
    "checkpoints/README.md": b"mine too",
    "checkpoints/0001-0000000010/remark.txt": b"a file beside shards",
    "manifests/notes.json": b"{}",
    "attempts/0001.json.bak": b"",
    "lightning_logs/version_0/hparams.yaml": b"lr: 1",
    ".hidden": b"",
}


def state_at(step: int) -> dict[str, Any]:
    """What a checkpoint of that step holds: one member that changes, one that never does, one small thing that belongs to the rank."""
    return {
        "model": {"weight": torch.full((40,), float(step)), "step": step},
        "backbone": {"weight": torch.arange(30.0)},
        "rank-00000": {"rng": torch.arange(step, step + 5, dtype=torch.uint8)},
    }


def snapshot_of(step: int, state: dict[str, Any]) -> Snapshot:
    """The images of a state, each in memory of its own, so that they stay valid, in a forked process too."""
    buffers = HostBuffers()
    images = (
        ShardImage(name, 0 if name[:4] == "rank" else None, memoryview(bytearray(buffers.capture(name, tree))))
        for name, tree in state.items()
    )
    return Snapshot(step, 0, step, finished=False, shards=tuple(images))


@functools.cache
def snapshot_at(step: int) -> Snapshot:
    """The images of `state_at`."""
    return snapshot_of(step, state_at(step))


def ignore(_: Event) -> None:
    """An event hook."""


def save(
    store: ObjectStore,
    *steps: int,
    keep: int = KEEP,
    expect: bool = True,
    snapshot: Callable[[int], Snapshot] = snapshot_at,
) -> Writer:
    """Start as the guard does, claim and resume, then commit these steps and sweep behind each."""
    run = open_run(store)
    claim = claim_attempt(store)
    checkpoint = resolve(store, run_id=run.run_id, load=True).require()
    manifest = checkpoint.manifest if checkpoint else None
    return write(store, run.run_id, claim.attempt, manifest, *steps, keep=keep, expect=expect, snapshot=snapshot)


def write(
    store: ObjectStore,
    run_id: str,
    attempt: int,
    resumed: Manifest | None,
    *steps: int,
    keep: int = KEEP,
    expect: bool = True,
    snapshot: Callable[[int], Snapshot] = snapshot_at,
) -> Writer:
    """Commit these steps in an attempt that is claimed already."""
    writer = Writer(store, run_id=run_id, attempt=attempt, retention=KeepNewest(keep), publish=ignore, resumed=resumed)
    for step in steps:
        writer.submit(snapshot(step), {"step": float(step)})
        writer.drain()
        if expect:
            assert writer.error is None, writer.error
    writer.close()
    return writer


def prepare(root: Path) -> None:
    """A run with two attempts and three checkpoints, what three interrupted saves have left behind, and other people's files."""
    store = LocalObjectStore(root, fs=Unsynced())
    save(store, 10, keep=9)
    save(store, 20, 30, keep=9)
    lost = CheckpointId(2, LOST)
    for key in (lost.shard_key("model"), CheckpointId(1, 15).shard_key("rank-00000")):
        with store.create(key) as writer:
            writer.write(b"of a save that died")
    (root / CHECKPOINTS / str(lost) / ".sg-backbone.pt-0123456789ab.tmp").write_bytes(b"ha")
    (root / MANIFESTS / f".sg-{lost}.json-0123456789ab.tmp").write_bytes(b"")
    put_foreign(root)


def put_foreign(root: Path) -> None:
    """Other people's files, in every place."""
    for name, data in FOREIGN.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    (root / "plots" / "today").mkdir(parents=True)


# -- what has to be true after any accident ------------------------------------------------------------------------------------------


def check_visible(root: Path) -> None:
    """Whatever a store lists is whole: every manifest intact, and every shard that it names."""
    store = LocalObjectStore(root)
    keys = [info.key for info in store.list("")]
    assert not [key for key in keys if ".sg-" in key]
    for key in keys:
        if (identity := parse_manifest_key(key)) is not None:
            Checkpoint(store, load_manifest(store, identity)).verify()
        elif (owner := parse_shard_key(key)) is not None and owner.step % 10 == 0 and owner.step != LOST:
            name = Path(key).stem
            assert read_object(store, key) == next(s.data for s in snapshot_at(owner.step).shards if s.name == name), (
                key
            )


def check_resolves(root: Path, allowed: Iterable[int]) -> int:
    """The newest checkpoint is whole, its content is that of its step, and the step is one of `allowed` (0 for a fresh start)."""
    store = LocalObjectStore(root)
    resolution = resolve(store, load=True)
    checkpoint = resolution.require()
    step = checkpoint.step if checkpoint else 0
    assert step in set(allowed), (step, resolution)
    if checkpoint is not None:
        check_content(resolution, step)
    return step


def check_content(resolution: Resolution, step: int) -> None:
    """What was loaded is what was saved at that step."""
    assert resolution.loaded is not None
    torch.testing.assert_close(resolution.loaded, state_at(step), rtol=0, atol=0)


def check_goes_on(root: Path, step: int, *, foreign: bool = True) -> None:
    """The next start saves and sweeps, and then there is nothing in the directory but what has a reason to be there."""
    store = LocalObjectStore(root, fs=Unsynced())
    save(store, step)
    check_tidy(root, foreign=foreign)
    check_resolves(root, [step])


def check_tidy(root: Path, *, foreign: bool = True) -> None:
    """Files are: the run, claims, manifests, the shards that these name, other people's. Directories: those of these files."""
    store = LocalObjectStore(root)
    named = {"run.json"}
    for info in store.list(MANIFESTS):
        if (identity := parse_manifest_key(info.key)) is not None:
            named |= {info.key} | {shard.key for shard in load_manifest(store, identity).shards}
    ours = named | {f"attempts/{path.name}" for path in (root / "attempts").glob("[0-9][0-9][0-9][0-9].json")}
    expected = ours | (set(FOREIGN) if foreign else set())
    found = [path for path in root.rglob("*") if path.is_file()]
    locks = [
        path for path in found if re.fullmatch(r"\.sg-.*\.lock", path.name) and path.with_name(path.name[4:-5]) in found
    ]
    assert {path.relative_to(root).as_posix() for path in found if path not in locks} == expected
    folders = {parent for name in expected for parent in Path(name).parents} | {Path("checkpoints"), Path("manifests")}
    folders |= {Path("plots"), Path("plots/today")} if foreign else set()
    assert {path.relative_to(root) for path in root.rglob("*") if path.is_dir()} == folders - {Path()}
    if foreign:
        assert {name: (root / name).read_bytes() for name in FOREIGN} == FOREIGN


# -- processes -----------------------------------------------------------------------------------------------------------------------


def in_child(action: Callable[[], object]) -> int:
    """Run something in a forked process; returns its exit status, 0 where it came to its end, negative where a signal ended it."""
    pid = fork()
    if pid == 0:
        end_child(action)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def fork() -> int:
    """As `os.fork`. Python 3.12 warns of threads that may hold locks; ours hold none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def end_child(action: Callable[[], object]) -> None:
    """Do what a child is for, and never return into the tests."""
    status = 99
    try:
        torch.set_num_threads(1)  # torch would wait for ever for threads that only the parent has
        action()
        status = 0
    except BaseException:  # noqa: BLE001 - nobody else would tell
        traceback.print_exc()
    finally:
        os._exit(status)


def kill_when_announced(action: Callable[[int], object]) -> bool:
    """Run something in a process, with the writing end of a pipe; SIGKILL it from outside when it says so. False if it never did."""
    reading, writing = os.pipe()
    pid = fork()
    if pid == 0:
        os.close(reading)
        end_child(lambda: action(writing))
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        announced = pipe.read(1) == b"!"
    if announced:
        os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == (-signal.SIGKILL if announced else 0)
    return announced


def copy_of(base: Path, place: Path) -> Path:
    """A fresh copy of a prepared run; the one before is gone."""
    shutil.rmtree(place, ignore_errors=True)
    if base.is_dir():
        shutil.copytree(base, place)
    return place


def faulty(root: Path, fs: Posix) -> LocalObjectStore:
    """The run, on a disk with a will of its own."""
    return LocalObjectStore(root, fs=fs)
