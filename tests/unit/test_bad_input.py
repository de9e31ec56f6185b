"""What a user gets wrong is said at once: which argument, and what to do."""

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from spotguard import (
    CheckpointStore,
    KeepBest,
    KeepNewest,
    KeepYoungerThan,
    LocalCheckpointStore,
    Preempted,
    PreemptionNotice,
    S3CheckpointStore,
    SpotGuard,
    TrainState,
)
from spotguard.errors import ConfigError, StateMismatchError
from spotguard.stores import open_store


def type_name(value: Any) -> str:
    """A test id that is the same in every process: an address or the order of a set is not."""
    return (
        next(iter(value))
        if isinstance(value, dict) and value and isinstance(next(iter(value)), str)
        else type(value).__name__
    )


def state(**members: Any) -> TrainState:
    return TrainState(**(members or {"model": torch.nn.Linear(2, 2)}))


def loader(length: int = 12, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.arange(float(length))), **{"batch_size": 2, **options})


class Stops:
    """A notice source that tells as soon as it is asked to."""

    name = "test"

    def __init__(self) -> None:
        self.now = threading.Event()
        self.heard = threading.Event()

    def watch(self, emit: Callable[[PreemptionNotice], None], stop: threading.Event) -> None:
        while not stop.is_set():
            if self.now.wait(0.05):
                emit(PreemptionNotice(source=self.name, kind="signal", detail="a test"))
                self.heard.set()
                return


def stop_in_batch(uri: Path, number: int, members: TrainState, data: Any) -> None:
    """Train until somebody stops it in that batch of the first epoch."""
    source = Stops()
    with pytest.raises(Preempted), SpotGuard(uri, members, every=10**9, notices=[source]) as guard:
        for _ in guard.epochs(2):
            for index, _ in enumerate(guard.batches(data)):
                if index == number:
                    source.now.set()
                    assert source.heard.wait(30)


# -- arguments -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "advice"),
    [
        ("gopher://host/run", "scheme 'gopher'.*Use a directory path"),
        ("s4://bucket/run", "scheme 's4'"),
        ("://run", "scheme ''"),
        ("s3:/bucket/run", "two slashes.*'./s3:/bucket/run'"),
        ("s3:bucket/run", "would be a directory.*s3://bucket.*'./s3:bucket/run'"),
        ("GS//bucket/run", "would be a directory.*'./GS//bucket/run'"),
        ("arn:aws:s3:::bucket/run", "would be a directory.*s3://bucket"),
        ("file:/data/run", "two slashes"),
        ("", "give a directory"),
        ("  ", "give a directory"),
        ("file://host/run", "three slashes"),
        ("file://", "three slashes"),
        (["a", "./a"], "named twice"),
        ([], "names no place"),
        (None, "uri"),
        (3, "uri"),
        (b"run", "uri"),
    ],
    ids=type_name,
)
def test_a_uri_that_names_no_store(uri: Any, advice: str) -> None:
    with pytest.raises(ConfigError, match=f"uri.*{advice}|{advice}"):
        SpotGuard(uri, state())


@pytest.mark.parametrize("place", ["file/run", "file", "/proc/no-such-thing", "/proc/self/run", "/dev/null/run"])
def test_a_path_that_cannot_be_written(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"uri=.*cannot be written to.*check the path"):
        SpotGuard(tmp_path / place, state()).__enter__()


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({"every": 0}, "every=0.*at least 1"),
        ({"every": -5}, "every=-5"),
        ({"every": 2.5}, "every='10m'"),
        ({"every": "0s"}, "above zero"),
        ({"every": "soon"}, "every='soon'.*'10m'"),
        ({"every": object()}, "not a save policy"),
        ({"every": KeepNewest(1)}, "not a save policy"),
        ({"keep": 0}, "at least 1"),
        ({"keep": "3"}, "not a retention policy.*keep=3"),
        ({"exit_code": 0}, "exit_code=0.*scheduler"),
        ({"exit_code": 256}, "exit_code=256"),
        ({"exit_code": -1}, "exit_code=-1"),
        ({"exit_code": "143x"}, "exit_code='143x'"),
        ({"notices": [object()]}, "notices.*watch"),
        ({"notices": 3}, "notices"),
    ],
    ids=type_name,
)
def test_an_argument_that_makes_no_sense(options: dict[str, Any], advice: str) -> None:
    with pytest.raises(ConfigError, match=advice):
        SpotGuard("memory://bad-input", state(), **options)


@pytest.mark.parametrize(
    "value", [torch.nn.Linear(1, 1), {"model": 1}, None, TrainState], ids=lambda value: type(value).__name__
)
def test_a_state_that_is_not_wrapped(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"state=.*TrainState\(model=model"):
        SpotGuard("memory://bad-input", value)


def test_a_member_without_state_dict() -> None:
    with pytest.raises(ConfigError, match=r"TrainState\(scheduler=.*state_dict"):
        TrainState(model=torch.nn.Linear(1, 1), scheduler=object())


class Holds:
    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> Any:
        return {"value": self.value}

    def load_state_dict(self, saved: Any) -> None:
        self.value = saved["value"]


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (lambda: None, "lambda"),
        (threading.Lock(), "lock"),
        (torch.nn.Linear(1, 1), "Linear"),
        (Path("x"), "Path"),
        (Holds(1), "Holds"),
    ],
    ids=["lambda", "lock", "module", "path", "object"],
)
def test_a_member_whose_state_cannot_be_read_back(value: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=f"member 'extra'.*{named}"):
        SpotGuard("memory://bad-input-member", state(extra=Holds(value))).__enter__()
    with pytest.raises(ConfigError, match=f"member 'extra'.*{named}"):
        CheckpointStore("memory://bad-input-store").save({"extra": {"value": value}}, step=1)


def test_a_metric_that_is_spelled_wrong_deletes_nothing() -> None:
    store = CheckpointStore("memory://misspelled-metric")
    for step in range(3):
        store.save({"model": {}}, step=step, metrics={"val_loss": 1.0})
    policy = KeepBest(3, "val_los") & KeepYoungerThan("1d") | KeepNewest(1)
    for dry_run in (True, False):
        with pytest.raises(ConfigError, match=r"'val_los'; they have 'val_loss'.*Nothing has been deleted"):
            store.prune(policy, dry_run=dry_run)
    assert len(store.list()) == 3
    assert len(store.prune(KeepBest(2, "val_loss")).drop) == 1


def test_a_metric_that_nobody_measures_is_told_of_once_while_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with SpotGuard(
        tmp_path, TrainState(model=torch.nn.Linear(1, 1)), keep=KeepBest(3, "val_los") | KeepNewest(1)
    ) as guard:
        for _ in guard.steps(5):
            guard.save(metrics={"val_loss": 1.0})
    (told,) = [record.getMessage() for record in caplog.records if "val_los'" in record.getMessage()]
    assert "no checkpoint has the metric 'val_los'; they have 'val_loss'. What" in told


def test_a_whole_bucket_or_a_web_address_is_no_place_for_a_run() -> None:
    for uri in ("gs://bucket", "gs://bucket/", "az://container", "abfs://container"):
        with pytest.raises(ConfigError, match="names a whole bucket"):
            open_store(uri)
    for uri in ("https://bucket.s3.amazonaws.com/run-17", "http://127.0.0.1:9000/bucket/run"):
        with pytest.raises(ConfigError, match="is a web address; write s3://bucket/run-17"):
            open_store(uri)
    with pytest.raises(ConfigError, match="uri=None is no text"):
        S3CheckpointStore(None)  # type: ignore[arg-type]


def test_a_checkpoint_store_refuses_what_it_cannot_do() -> None:
    store = CheckpointStore("memory://bad-input-store")
    for step in (-1, True, 1.5, "1"):
        with pytest.raises(ConfigError, match="step="):
            store.save({"model": {}}, step=step)  # type: ignore[arg-type]
    for metrics in (0.3, {"loss": "abc"}, {"loss": None}, {"loss": [1.0, 2.0]}):
        with pytest.raises(ConfigError, match=r"save\(metrics=.*val_loss"):
            store.save({"model": {}}, step=1, metrics=metrics)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="names and states"):
        store.save(5, step=1)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="nothing to save"):
        store.save({}, step=1)
    with pytest.raises(ConfigError, match="member name"):
        store.save({"my-model": {}}, step=1)
    with pytest.raises(ConfigError, match="not a local path"):
        LocalCheckpointStore("memory://x")
    with pytest.raises(ConfigError, match="0004-0000001200"):
        store.get("newest")


# -- on resume -------------------------------------------------------------------------------------------------------------------------


def finished(uri: Path, **members: Any) -> None:
    with SpotGuard(uri, TrainState(**members)) as guard:
        for _ in guard.steps(2):
            pass


def test_a_renamed_member(tmp_path: Path) -> None:
    finished(tmp_path, model=torch.nn.Linear(2, 2))
    with pytest.raises(StateMismatchError, match=r"holds \['model'\].*has \['net'\].*new run"):
        SpotGuard(tmp_path, TrainState(net=torch.nn.Linear(2, 2))).__enter__()


def test_a_missing_and_an_added_member(tmp_path: Path) -> None:
    finished(tmp_path, model=torch.nn.Linear(2, 2), ema=torch.nn.Linear(2, 2))
    with pytest.raises(StateMismatchError, match=r"holds \['ema'\]"):
        SpotGuard(tmp_path, TrainState(model=torch.nn.Linear(2, 2))).__enter__()
    with pytest.raises(StateMismatchError, match=r"has \['third'\]"):
        SpotGuard(tmp_path, state(**{name: torch.nn.Linear(2, 2) for name in ("model", "ema", "third")})).__enter__()


def test_a_model_of_another_shape(tmp_path: Path) -> None:
    finished(tmp_path, model=torch.nn.Linear(2, 2))
    with pytest.raises(StateMismatchError, match=r"(?s)member 'model'.*size mismatch"):
        SpotGuard(tmp_path, TrainState(model=torch.nn.Linear(3, 2))).__enter__()


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (lambda: loader(batch_size=3), "batch size was 2 and is 3"),
        (lambda: loader(14), "dataset length was 12 and is 14"),
        (lambda: loader(drop_last=True), "drop_last was False and is True"),
    ],
    ids=["batch size", "dataset length", "drop_last"],
)
def test_a_changed_loader(tmp_path: Path, changed: Callable[[], Any], named: str) -> None:
    stop_in_batch(tmp_path, 2, state(), loader())
    with pytest.raises(StateMismatchError, match=f"{named}.*new run"), SpotGuard(tmp_path, state()) as guard:
        for _ in guard.epochs(2):
            for _ in guard.batches(changed()):
                raise AssertionError("a batch of a loader that has changed")


# -- how it is used --------------------------------------------------------------------------------------------------------------------


def test_two_guards_on_one_run(tmp_path: Path) -> None:
    with (
        SpotGuard(tmp_path, state()),
        pytest.raises(ConfigError, match=r"another SpotGuard of this process.*URI of its own"),
    ):
        SpotGuard(tmp_path, state()).__enter__()
    with SpotGuard(tmp_path, state()):  # the first is gone
        pass


def test_one_guard_entered_twice(tmp_path: Path) -> None:
    guard = SpotGuard(tmp_path, state())
    with guard, pytest.raises(ConfigError, match="entered before"):
        guard.__enter__()
    with pytest.raises(ConfigError, match="entered before"):
        guard.__enter__()


def test_a_guard_in_a_thread(tmp_path: Path) -> None:
    caught: list[BaseException] = []

    def train() -> None:
        try:
            SpotGuard(tmp_path, state()).__enter__()
        except ConfigError as error:
            caught.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert "main thread" in str(caught[0])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "use",
    [
        lambda guard: guard.epochs(1),
        lambda guard: guard.batches(loader()),
        lambda guard: guard.steps(1),
        lambda guard: guard.step_done(),
        lambda guard: guard.save(),
    ],
    ids=["epochs", "batches", "steps", "step_done", "save"],
)
def test_a_guard_outside_of_its_block(tmp_path: Path, use: Callable[[SpotGuard], Any]) -> None:
    guard = SpotGuard(tmp_path, state())
    with pytest.raises(ConfigError, match="inside 'with SpotGuard"):
        use(guard)
    with guard:
        pass
    with pytest.raises(ConfigError, match="inside 'with SpotGuard"):
        use(guard)


def run(things: Any) -> None:
    for _ in things:
        pass


def after_a_step(guard: SpotGuard, things: Any) -> None:
    guard.step_done()
    run(things)


def inside(outer: Any, action: Callable[[], Any]) -> None:
    for _ in outer:
        action()


@pytest.mark.parametrize(
    "mixed",
    [
        lambda guard: inside(guard.batches(loader()), guard.step_done),
        lambda guard: inside(guard.steps(3), guard.step_done),
        lambda guard: after_a_step(guard, guard.batches(loader())),
        lambda guard: after_a_step(guard, guard.steps(3)),
        lambda guard: inside(guard.batches(loader()), lambda: run(guard.steps(3))),
        lambda guard: inside(guard.batches(loader()), lambda: run(guard.batches(loader()))),
        lambda guard: inside(guard.steps(3), lambda: run(guard.steps(3))),
        lambda guard: run(zip(guard.batches(loader()), guard.batches(loader()), strict=True)),
    ],
    ids=[
        "step_done in batches",
        "step_done in steps",
        "batches after step_done",
        "steps after step_done",
        "steps in batches",
        "batches in batches",
        "steps in steps",
        "two batches at once",
    ],
)
def test_steps_that_are_counted_twice(tmp_path: Path, mixed: Callable[[SpotGuard], Any]) -> None:
    with (
        pytest.raises(ConfigError, match=r"counts the steps already|another pass over a loader is under way"),
        SpotGuard(tmp_path, state()) as guard,
    ):
        mixed(guard)


@pytest.mark.parametrize("total", [0, -1, 1.5, "3", True, None])
def test_a_number_of_epochs_or_steps_that_is_none(total: Any) -> None:
    with SpotGuard("memory://bad-input-totals", state()) as guard:
        with pytest.raises(ConfigError, match="whole number of at least 1"):
            guard.epochs(total)
        with pytest.raises(ConfigError, match="whole number of at least 1"):
            guard.steps(total)


def test_batches_of_what_is_no_loader() -> None:
    with SpotGuard("memory://bad-input-batches", state()) as guard, pytest.raises(ConfigError, match=r"batches\(int\)"):
        guard.batches(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", ["2", "64"])
def test_several_ranks(monkeypatch: pytest.MonkeyPatch, size: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(ConfigError, match=f"{size} ranks"):
        SpotGuard("memory://bad-input-ranks", state()).__enter__()


def test_the_error_ends_a_script_with_its_advice_and_status_1(tmp_path: Path) -> None:
    code = "import torch; from spotguard import SpotGuard as G, TrainState as T; G('gopher://x', T(m=torch.nn.Linear(1, 1)))"
    run_ = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert run_.returncode == 1
    assert "ConfigError: uri='gopher://x': scheme 'gopher' is not known" in run_.stderr


def test_members_without_a_name() -> None:
    with pytest.raises(ConfigError, match=r"TrainState\(model=model"):
        TrainState(torch.nn.Linear(1, 1))


@pytest.mark.parametrize("metrics", [0.3, {"loss": "abc"}, {"loss": None}])
def test_metrics_that_are_no_numbers(metrics: Any, tmp_path: Path) -> None:
    with SpotGuard(tmp_path, state()) as guard, pytest.raises(ConfigError, match=r"save\(metrics=.*val_loss"):
        guard.save(metrics=metrics)
