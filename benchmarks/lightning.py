"""Stock Lightning against spotguard, the same fits interrupted in the same places: `python benchmarks/lightning.py`.

`--output FILE` writes the page for the documentation. Every cell is measured: each fit runs in a forked child with a deadline, is
interrupted, started again, and compared with a fit of the same kind that nobody touched. Counts and yes or no, no times.
"""
# ruff: noqa: E402 - the path has to be set before the imports

import argparse
import contextlib
import copy
import inspect
import json
import os
import signal
import socket
import sys
import tempfile
import textwrap
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.remove(str(HERE))  # or this file would be taken for the package `lightning`
sys.path.append(str(HERE.parent / "tests"))  # the fits are those of the test suite

import torch
from pytorch_lightning.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from equivalence.fitting import BATCH, CASES, Case, Model, Quiet, fit
from spotguard import CheckpointStore
from spotguard.lightning import SpotGuardCallback

DEADLINE = 60.0
Side = Callable[..., Any]
# What releases before 2.6 do not know.
NEW: Any = {name: True for name in ("save_on_exception",) if name in inspect.signature(ModelCheckpoint).parameters}


class Stock(ModelCheckpoint):
    """What Lightning offers by itself, in the place of the guard."""

    def __init__(self, folder: Path, *, every: int, keep: int) -> None:  # noqa: ARG002 - all are kept
        super().__init__(folder, every_n_train_steps=every, save_top_k=-1, save_last=True, **NEW)

    def resume_path(self) -> str:
        """For `fit(ckpt_path=...)`."""
        return "last"


SIDES: dict[str, Side] = {"stock": Stock, "spotguard": SpotGuardCallback}


class Plain(Model):
    """Draws no random numbers."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.net[1] = torch.nn.Identity()


def in_order(kind: Any) -> Callable[[], Any]:
    return lambda: kind(Quiet(), batch_size=BATCH)


# The test suite has random numbers everywhere. These have none, so that stock Lightning gets a chance.
CONTROLS = [
    (Case(f"no random numbers, {name}", model=Plain, train=in_order(kind), validation=in_order(DataLoader)), every)
    for name, kind, every in (
        ("`DataLoader` in order", DataLoader, 3),
        ("`DataLoader` in order, saved at the end of each epoch only", DataLoader, 4),
        ("`StatefulDataLoader` in order", StatefulDataLoader, 3),
    )
]


@dataclass(frozen=True)
class Stop:
    """A signal that comes in the midst of a step."""

    number: signal.Signals
    at: int
    kind: str = "train"
    group: bool = False


@dataclass(frozen=True)
class Result:
    """What the last start of a fit has left behind.

    Attributes:
        status: Its exit status, None where it did not end before the deadline.
        error: What it failed with.
        resumed: Batches that had been trained in the checkpoint it began with, None where it began with none.
        weights: At the end, None where it did not get there.
        seen: Epoch and samples of each batch that the weights were trained with.
        logged: Step, name and value of everything that reached the logger, over all starts.
        validated: Epoch, and more, of each batch that was validated, over all starts.
    """

    status: int | None = None
    error: str | None = None
    resumed: int | None = None
    weights: dict[str, torch.Tensor] | None = None
    seen: list[Any] = field(default_factory=list)
    logged: set[tuple[int, str, float]] = field(default_factory=set)
    validated: list[Any] = field(default_factory=list)

    @property
    def ending(self) -> str:
        """Exit status and error, as a cell."""
        return "hangs" if self.status is None else f"`{self.status}`" + (f" (`{self.error}`)" if self.error else "")


def recording(model: type[Model], folder: Path) -> type[Model]:
    """A module that keeps in its checkpoints what it was trained with."""

    class Recording(model):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.seen: list[Any] = []

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            first = batch["a"] if isinstance(batch, dict) else batch
            self.seen.append((self.current_epoch, first[0].tolist()))
            return super().training_step(batch, batch_idx)

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["seen"] = list(self.seen)

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.seen = list(checkpoint["seen"])
            (folder / "resumed").write_text(str(len(self.seen)))

    return Recording


def child(case: Case, folder: Path, side: Side, stop: Stop | None, every: int) -> None:
    """The user's script, in a process of its own."""
    ticks: Counter[str] = Counter()

    def tick(kind: str) -> None:
        ticks[kind] += 1
        if stop is not None and stop.number == signal.SIGKILL:
            time.sleep(0.1)  # as in real fits, a step is longer than a save: one that finds another busy is left out
        if stop is not None and kind == stop.kind and ticks[kind] == stop.at + 1:
            (os.killpg if stop.group else os.kill)(os.getpid(), stop.number)

    def callbacks(path: Path) -> list[Any]:
        return [*case.callbacks(path), *([OnExceptionCheckpoint(path / "run")] if side is Stock else [])]

    changed = copy.copy(case)
    changed.model, changed.callbacks = recording(case.model, folder), callbacks
    trainer = fit(changed, folder, tick, side, every=every)
    torch.save(trainer.lightning_module.state_dict(), folder / "weights.pt")
    (folder / "seen.json").write_text(json.dumps(trainer.lightning_module.seen))


def fork(work: Callable[[], None], folder: Path) -> int:
    """Begin some work in a child; returns its process id, which is that of its group as well."""
    folder.mkdir(exist_ok=True)
    for name in ("resumed", "error", "weights.pt", "seen.json"):
        (folder / name).unlink(missing_ok=True)
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        os.setsid()
        output = os.open(folder / "output.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        work()
        status = 0
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException as error:  # noqa: BLE001 - the child must end here, whatever happened
        traceback.print_exc()
        said = str(error).partition("\n")[0].replace("`", "'").replace("|", "/")
        (folder / "error").write_text(f"{type(error).__name__}: {textwrap.shorten(said, 62, placeholder=' ...')}")
    finally:
        os._exit(status)


def wait(processes: Sequence[int], deadline: float = DEADLINE) -> list[int | None]:
    """Exit statuses; None for a process that had to be killed at the deadline."""
    statuses: dict[int, int | None] = {}
    limit = time.monotonic() + deadline
    while len(statuses) < len(processes) and time.monotonic() < limit:
        for process in processes:
            if process not in statuses and (ended := os.waitpid(process, os.WNOHANG))[0]:
                statuses[process] = os.waitstatus_to_exitcode(ended[1])
        time.sleep(0.01)
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)
        if process not in statuses:
            os.waitpid(process, 0)
    return [statuses.get(process) for process in processes]


def run(case: Case, folder: Path, side: Side, stop: Stop | None = None, every: int = 3) -> Result:
    """One start of a fit."""
    (status,) = wait([fork(lambda: child(case, folder, side, stop, every), folder)])
    return read(folder, status)


def stopped(
    case: Case, folder: Path, side: Side, stop: Stop, every: int = 3, between: Callable[[], None] = lambda: None
) -> tuple[Result, Result]:
    """A fit that is stopped, and started again."""
    first = run(case, folder, side, stop, every)
    between()
    return first, run(case, folder, side, every=every)


def untouched_run(case: Case, folder: Path, side: Side, every: int = 3) -> Result:
    """What the others are compared with."""
    result = run(case, folder, side, every=every)
    if result.status != 0:
        raise SystemExit(f"{case.feature}: not even an untouched fit ends well\n{(folder / 'output.txt').read_text()}")
    return result


def read(folder: Path, status: int | None) -> Result:
    """What is there now."""

    def text(name: str) -> str | None:
        return (folder / name).read_text() if (folder / name).exists() else None

    # a NaN would differ from itself
    entries = [json.loads(line, parse_constant=str) for line in (text("book.jsonl") or "").splitlines()]
    return Result(
        status,
        text("error"),
        int(resumed) if (resumed := text("resumed")) else None,
        torch.load(folder / "weights.pt") if (folder / "weights.pt").exists() else None,
        json.loads(text("seen.json") or "[]"),
        {(entry[0], *item) for what, entry in entries if what == "log" for item in entry[1].items()},
        [entry for what, entry in entries if what == "validate"],
    )


def same_weights(untouched: Result, result: Result) -> str:
    """Bit for bit?"""
    if result.weights is None or untouched.weights is None:
        return "-"
    same = all(torch.equal(value, result.weights[name]) for name, value in untouched.weights.items())
    return "yes" if same else "no"


def same_samples(untouched: Result, result: Result) -> str:
    """Has each epoch trained with as many different samples as an untouched one, and with each of them once?"""
    if result.weights is None:
        return "-"
    epochs: dict[int, tuple[list[int], list[int]]] = {}
    for which, one in enumerate((untouched, result)):
        for epoch, samples in one.seen:
            epochs.setdefault(epoch, ([], []))[which].extend(samples)
    again = sum(len(got) - len(set(got)) for _, got in epochs.values())
    missed = sum(max(0, len(set(due)) - len(set(got))) for due, got in epochs.values())
    return f"{again} again, {missed} missed" if again or missed else "yes"


def same_log(untouched: Result, result: Result) -> str:
    """Does the logger hold the same values, those of steps that were done twice included?"""
    if result.weights is None:
        return "-"
    missing, others = untouched.logged - result.logged, result.logged - untouched.logged
    return f"{len(missing)} missing, {len(others)} others" if missing or others else "yes"


def restart(result: Result) -> str:
    """What happened when it was started again."""
    if result.status != 0:
        return f"fails: {result.ending}" if result.status else "hangs"
    return "begins anew" if result.resumed is None else f"after batch {result.resumed}"


def named(feature: str) -> Case:
    """One of the suite's."""
    return next(case for case in CASES if case.feature == feature)


def place(untouched: Result, batch: int) -> int:
    """Number, over all, of this batch of the second epoch, or of the last one there is."""
    numbers = [number for number, (epoch, _) in enumerate(untouched.seen) if epoch == 1]
    return numbers[min(batch, len(numbers) - 1)]


def newest(folder: Path, side: Side) -> Path:
    """The file that a restart would begin with."""
    if side is Stock:
        return max((folder / "run").glob("last*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    checkpoint = CheckpointStore(folder / "run").latest()
    assert checkpoint is not None
    return folder / "run" / "checkpoints" / str(checkpoint.manifest.id) / "model.ckpt"


def flip_a_byte(path: Path) -> None:
    """In the weights."""
    content = bytearray(path.read_bytes())
    weights = torch.load(path, weights_only=True)["state_dict"]["net.0.weight"].numpy().tobytes()
    content[content.index(weights) + len(weights) // 2] ^= 0xFF
    path.write_bytes(content)


def cut_in_half(path: Path) -> None:
    """As if it had been half-written."""
    os.truncate(path, path.stat().st_size // 2)


def damaged(folder: Path, side: Side, damage: Callable[[Path], None]) -> str:
    """SIGKILL, damage to the newest checkpoint, restart; in a case in which stock Lightning is exact otherwise."""
    case, where = CONTROLS[-1][0], folder / "killed"
    untouched = untouched_run(case, folder / "untouched", side)
    stop = Stop(signal.SIGKILL, place(untouched, 2))
    _, result = stopped(case, where, side, stop, between=lambda: damage(newest(where, side)))
    return f"{restart(result)}; weights equal: {same_weights(untouched, result)}"


def finished(folder: Path, side: Side) -> str:
    """A run that has come to its end is started again."""
    before = untouched_run(CASES[0], folder, side)
    after = run(CASES[0], folder, side)
    return f"{restart(after)}, trains {len(after.seen) - len(before.seen)} more; weights equal: {same_weights(before, after)}"


def in_validation(folder: Path, side: Side) -> str:
    """SIGTERM in the first batch of a validation in the middle of the second epoch."""
    case = named("`val_check_interval` within the epoch")
    untouched = untouched_run(case, folder / "untouched", side)
    at = next(number for number, (epoch, *_) in enumerate(untouched.validated) if epoch == 1)
    first, result = stopped(case, folder / "stopped", side, Stop(signal.SIGTERM, at, kind="validate"))
    due, done = ({step for step, name, _ in one.logged if name == "val_loss_epoch"} for one in (untouched, result))
    count = f"results of {len(due & done)} of {len(due)} validations logged"
    return f"exit {first.ending}; {restart(result)}; {count}; weights equal: {same_weights(untouched, result)}"


def whole_group(folder: Path, side: Side) -> str:
    """SIGTERM to the trainer and its workers alike, as many a scheduler sends it."""
    case = named("worker processes")
    untouched = untouched_run(case, folder / "untouched", side)
    stop = Stop(signal.SIGTERM, place(untouched, 1), group=True)
    first, result = stopped(case, folder / "stopped", side, stop)
    return f"exit {first.ending}; {restart(result)}; weights equal: {same_weights(untouched, result)}"


def two_ranks(folder: Path, side: Side, told: int | None) -> str:
    """Two processes with gloo, and SIGTERM to one of them."""
    case = Case("two ranks", strategy="ddp", devices=2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def work(rank: int) -> None:
        fixed = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "none", "GROUP_RANK": 0}
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        os.environ.update({name: str(value) for name, value in {**fixed, **ranks}.items()})
        child(case, folder / str(rank), side, Stop(signal.SIGTERM, 3) if rank == told else None, 3)

    statuses = wait([fork(lambda rank=rank: work(rank), folder / str(rank)) for rank in range(2)], DEADLINE / 2)  # type: ignore[misc]
    results = [read(folder / str(rank), status) for rank, status in enumerate(statuses)]
    if results[0].ending == results[1].ending:
        return f"both ranks: {results[0].ending}"
    return ", ".join(f"rank {rank}: {result.ending}" for rank, result in enumerate(results))


EVENTS: dict[str, Callable[[Path, Side], str]] = {
    "SIGKILL, the newest checkpoint is whole": lambda folder, side: damaged(folder, side, lambda _: None),
    "SIGKILL, a byte of the newest checkpoint is flipped": lambda folder, side: damaged(folder, side, flip_a_byte),
    "SIGKILL, half of the newest checkpoint is gone": lambda folder, side: damaged(folder, side, cut_in_half),
    "a finished run is started again": finished,
    "SIGTERM in a validation": in_validation,
    "SIGTERM to the trainer and its two workers": whole_group,
    "two ranks, no signal": lambda folder, side: two_ranks(folder, side, None),
    "two ranks, SIGTERM to rank 0": lambda folder, side: two_ranks(folder, side, 0),
    "two ranks, SIGTERM to rank 1": lambda folder, side: two_ranks(folder, side, 1),
}
JUDGES = {"weights": same_weights, "samples": same_samples, "log": same_log}
INTERRUPTIONS = {signal.SIGTERM: 1, signal.SIGKILL: 2}
Row = dict[str, str]


def interrupted(case: Case, every: int, folder: Path, rows: dict[signal.Signals, list[Row]]) -> str | None:
    """Measure one case; returns its name if the guard changes what an untouched run ends with."""
    print(case.feature, file=sys.stderr)
    folder.mkdir()
    measured = {number: {"case": case.feature} for number in INTERRUPTIONS}
    weights: list[Result] = []
    for name, side in SIDES.items():
        untouched = untouched_run(case, folder / name, side, every)
        weights.append(untouched)
        for number, batch in INTERRUPTIONS.items():
            where = folder / f"{name}-{number.name}"
            first, result = stopped(case, where, side, Stop(number, place(untouched, batch)), every)
            cells = {title: judge(untouched, result) for title, judge in JUDGES.items()}
            cells |= {"exit": first.ending} if number is signal.SIGTERM else {}
            cells |= {"restart": restart(result)}
            measured[number] |= {f"{name}: {title}": cell for title, cell in cells.items()}
    for number, row in measured.items():
        rows[number].append(row)
    return None if same_weights(*weights) == "yes" else case.feature


def table(rows: Sequence[Row]) -> str:
    """In markdown."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def summary(rows: dict[signal.Signals, list[Row]]) -> str:
    """How many cases end as if they had never been touched."""
    return table(
        [
            {"": f"{number.name}: {title} as untouched"}
            | {name: f"{sum(row[f'{name}: {title}'] == 'yes' for row in found)} of {len(found)}" for name in SIDES}
            for number, found in rows.items()
            for title in JUDGES
        ]
    )


PAGE = Path(__file__).with_name("lightning_page.md").read_text()
DIFFER = (
    "With the guard, workers draw other random numbers, [seeded for each sample](exactness.md). These cases differ:"
)


def main() -> None:
    """Measure everything, and print the page or write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="markdown file to write; default: standard output")
    output = parser.parse_args().output
    rows: dict[signal.Signals, list[Row]] = {number: [] for number in INTERRUPTIONS}
    cases = [*((case, 3) for case in CASES), *CONTROLS]
    with tempfile.TemporaryDirectory() as name:
        differ = [interrupted(case, every, Path(name, str(at)), rows) for at, (case, every) in enumerate(cases)]
        events = []
        for at, (event, measure) in enumerate(EVENTS.items()):
            print(event, file=sys.stderr)
            measured = {}
            for side_name, side in SIDES.items():
                folder = Path(name, f"event-{at}-{side_name}")
                folder.mkdir()
                measured[side_name] = measure(folder, side)
            events.append({"event": event, **measured})
    others = [feature for feature in differ if feature is not None]
    page = PAGE.format(
        lightning=version("pytorch_lightning"),
        torch=torch.__version__,
        exception=", save_on_exception=True" if NEW else "",
        controls=len(CONTROLS),
        control=CONTROLS[-1][0].feature,
        summary=summary(rows),
        same=f"{len(cases) - len(others)} of {len(cases)}",
        differ=f"{DIFFER} {'; '.join(others)}." if others else "",
        events=table(events),
        deadline=DEADLINE / 2,
        **{number.name: table(found) for number, found in rows.items()},
    )
    if output is None:
        print(page)
    else:
        output.write_text(page)


if __name__ == "__main__":
    main()
