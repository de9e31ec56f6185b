"""``spotguard status``, over runs that really ended that way."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from spotguard import CheckpointStore, Preempted, SpotGuard, TrainState
from spotguard.cli.app import app
from spotguard.errors import StateMismatchError

KILLED_IN_STEP = """
import os, signal, sys, torch
from spotguard import SpotGuard, TrainState
with SpotGuard(sys.argv[1], TrainState(model=torch.nn.Linear(2, 2)), every=1, notices="none") as guard:
    for step in guard.steps(1000):
        if step == int(sys.argv[2]):
            guard._session.writer.drain()
            os.kill(os.getpid(), signal.SIGKILL)
"""


def train(uri: Path, steps: int = 5, *, at: int = -1, then: Callable[[], None] = lambda: None) -> None:
    with SpotGuard(uri, TrainState(model=torch.nn.Linear(2, 2)), every=10**9, notices="none") as guard:
        for step in guard.steps(steps):
            if step == at:
                then()


def preempt(uri: Path, steps: int = 5) -> None:
    with pytest.raises(Preempted):
        train(uri, steps, at=steps - 3, then=lambda: os.kill(os.getpid(), signal.SIGTERM))


def kill(uri: Path, *, step: int) -> None:
    status = subprocess.run([sys.executable, "-c", KILLED_IN_STEP, str(uri), str(step)], check=False).returncode
    assert status == -signal.SIGKILL


def fail() -> None:
    raise ValueError("the loss is NaN")


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["status", *map(str, arguments)], catch_exceptions=False)


def status(uri: Path, *, code: int = 0) -> Any:
    result = invoke(uri, "--json")
    assert result.exit_code == 0, result.output
    assert invoke(uri, "--finished").exit_code == code
    return json.loads(result.stdout)


def test_a_finished_run_is_finished(tmp_path: Path) -> None:
    train(tmp_path)
    found = status(tmp_path)
    assert (found["state"], found["step"], found["exit_code"]) == ("finished", 5, 0)
    assert found["checkpoint"] == "0001-0000000005"
    assert "finished" in invoke(tmp_path).stdout
    assert invoke(tmp_path, "--word").stdout == "finished\n"


def test_a_stopped_run_says_what_stopped_it_and_is_not_finished(tmp_path: Path) -> None:
    preempt(tmp_path)
    found = status(tmp_path, code=1)
    assert (found["state"], found["step"], found["notice"], found["exit_code"]) == ("preempted", 3, "SIGTERM", 143)
    assert found["checkpoint"] == CheckpointStore(tmp_path).list()[-1].id
    assert found["host"]
    text = invoke(tmp_path).stdout
    assert "SIGTERM" in text
    assert "143" in text


def test_a_failed_run_says_what_failed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="NaN"):
        train(tmp_path, at=2, then=fail)
    found = status(tmp_path, code=1)
    assert (found["state"], found["detail"]) == ("failed", "ValueError: the loss is NaN")


def test_a_killed_attempt_leaves_no_word_and_that_of_an_older_one_does_not_count(tmp_path: Path) -> None:
    preempt(tmp_path)
    kill(tmp_path, step=4)
    found = status(tmp_path, code=1)
    assert (found["state"], found["attempt"], found["step"]) == ("unknown", 2, 4)
    assert found["says"] == "running, or killed without a word"
    assert found["notice"] is None
    assert " ago" in invoke(tmp_path).stdout


def test_a_finished_run_that_is_continued_is_not_finished_until_it_is(tmp_path: Path) -> None:
    train(tmp_path, 5)
    kill(tmp_path, step=7)
    assert status(tmp_path, code=1)["state"] == "unknown"
    preempt(tmp_path, 20)
    assert status(tmp_path, code=1)["state"] == "preempted"
    train(tmp_path, 20)
    assert status(tmp_path)["step"] == 20


def test_a_finished_run_that_was_rolled_back_is_not_finished(tmp_path: Path) -> None:
    preempt(tmp_path)
    train(tmp_path)
    status(tmp_path)
    CheckpointStore(tmp_path).rollback(step=3)
    found = status(tmp_path, code=1)
    assert (found["state"], found["says"]) == ("unknown", "rolled back, and not started since")
    assert found["step"] == 3


def test_a_finished_run_that_is_started_again_stays_finished(tmp_path: Path) -> None:
    train(tmp_path)
    train(tmp_path)
    assert status(tmp_path)["attempt"] == 2


def test_a_run_that_was_killed_behind_its_last_commit_is_finished(tmp_path: Path) -> None:
    train(tmp_path)
    (tmp_path / "exit.json").unlink()
    assert status(tmp_path)["state"] == "finished"


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b'{"state": "finished", "attempt": 1, "step": 5}'])
def test_a_damaged_record_is_said_and_not_believed(tmp_path: Path, damage: bytes) -> None:
    preempt(tmp_path)
    (tmp_path / "exit.json").write_bytes(damage)
    found = status(tmp_path, code=1)
    assert found["state"] == "unknown"
    assert "exit.json" in found["detail"]
    assert "exit.json" in invoke(tmp_path).stdout


def test_a_damaged_claim_is_said(tmp_path: Path) -> None:
    train(tmp_path)
    preempt(tmp_path, 10)
    (tmp_path / "exit.json").unlink()
    (tmp_path / "attempts/0002.json").write_bytes(b"torn")
    assert "0002.json" in status(tmp_path, code=1)["says"]


def test_a_run_that_is_not_there_is_not_finished(tmp_path: Path) -> None:
    assert invoke(tmp_path / "rnu", "--finished").exit_code == 1
    assert not (tmp_path / "rnu").exists()


def test_asking_does_not_load_torch(tmp_path: Path) -> None:
    train(tmp_path)
    code = f"""
import sys
from spotguard.cli.app import app
from spotguard.errors import StateMismatchError
app(['status', {str(tmp_path)!r}], standalone_mode=False)
app(['doctor', {str(tmp_path)!r}], standalone_mode=False)
assert 'torch' not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_number_of_the_newest_attempt_is_0_before_the_first(tmp_path: Path) -> None:
    assert invoke(tmp_path / "run", "--attempt").stdout == "0\n"
    assert not (tmp_path / "run").exists()
    train(tmp_path / "run")
    assert invoke(tmp_path / "run", "--attempt").stdout == "1\n"
    kill(tmp_path / "run", step=7)
    assert invoke(tmp_path / "run", "--attempt").stdout == "2\n"


def test_a_start_that_has_not_come_as_far_as_the_run_has_failed_whatever_the_one_before_it_said(tmp_path: Path) -> None:
    preempt(tmp_path)
    assert invoke(tmp_path, "--word", "--after", 0).stdout == "preempted\n"
    assert invoke(tmp_path, "--word", "--after", 1).stdout == "failed\n"
    report = json.loads(invoke(tmp_path, "--json", "--after", 1).stdout)
    assert (report["state"], report["attempt"], report["step"]) == ("failed", 1, 3)
    assert "since attempt 1" in report["says"]
    train(tmp_path)
    assert invoke(tmp_path, "--finished", "--after", 1).exit_code == 0
    assert invoke(tmp_path, "--finished", "--after", 2).exit_code == 1


def test_a_start_that_fails_before_the_first_step_has_failed(tmp_path: Path) -> None:
    preempt(tmp_path)
    wider = TrainState(model=torch.nn.Linear(9, 9))
    with pytest.raises(StateMismatchError), SpotGuard(tmp_path, wider, notices="none"):
        pass
    found = status(tmp_path, code=1)
    assert (found["state"], found["attempt"]) == ("failed", 2)
    assert (found["checkpoint"], found["step"]) == ("0001-0000000003", 3)
    assert "StateMismatchError" in found["detail"]
