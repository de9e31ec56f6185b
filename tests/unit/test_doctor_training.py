"""A training that runs, looked at from outside: real processes, of which the kernel tells what they do with a signal."""

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from spotguard.ops.doctor.process import Process
from spotguard.ops.doctor.training import examine_training, signal_of_training

TERM = frozenset({signal.SIGTERM})

RUNS = """
import ctypes, signal, sys, threading
def say(): print("ready", flush=True); sys.stdin.readline()
"""
HANDLED = "signal.signal(signal.SIGTERM, lambda *_: None); say()"
IN_C = "ctypes.CDLL(None).signal(15, ctypes.cast(ctypes.CDLL(None).abs, ctypes.c_void_p)); say()"
IGNORED = "signal.signal(signal.SIGTERM, signal.SIG_IGN); say()"
BLOCKED = "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]); say()"
BLOCKED_BUT_FOR_ONE = (
    f"threading.Thread(target=threading.Event().wait, daemon=True).start(); {HANDLED.removesuffix('say()')}{BLOCKED}"
)


@contextlib.contextmanager
def running(code: str) -> Iterator[int]:
    command = [sys.executable, "-c", RUNS + code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield process.pid
        process.kill()


@pytest.mark.parametrize(
    ("code", "level", "word"),
    [
        (HANDLED, "ok", "handler"),
        (IN_C, "ok", "handler"),
        (BLOCKED_BUT_FOR_ONE, "ok", "handler"),
        ("say()", "warning", "no handler"),
        (IGNORED, "problem", "ignores"),
        (BLOCKED, "problem", "blocked"),
    ],
)
def test_what_becomes_of_a_sigterm_is_told_of_a_process_that_runs(code: str, level: str, word: str) -> None:
    with running(code) as pid:
        found = [finding for finding in examine_training(pid) if "SIGTERM" in finding.what]
    assert [finding.level for finding in found] == [level], found
    assert word in found[0].what


def test_process_1_without_a_handler_hears_nothing() -> None:
    first = Process(1, 0, "python")
    assert signal_of_training(first, "SIGTERM", frozenset()).level == "problem"
    assert signal_of_training(Process(1, 0, "python", caught=TERM), "SIGTERM", frozenset()).level == "ok"


def test_a_process_that_is_not_there_is_a_problem() -> None:
    (finding,) = examine_training(2**22 + 1)
    assert finding.level == "problem"


def test_the_training_of_a_run_is_found_by_its_claim(tmp_path: Path) -> None:
    code = f"""
import torch
from spotguard import SpotGuard, TrainState
with SpotGuard({str(tmp_path)!r}, TrainState(model=torch.nn.Linear(2, 2)), every=10**9, notices="none") as guard:
    for step in guard.steps(10**9):
        if step == 2:
            say()
"""
    doctor = [sys.executable, "-c", "from spotguard.cli import main; main()", "doctor", str(tmp_path), "--json"]
    with running(code) as pid:
        done = subprocess.run(doctor, capture_output=True, text=True, check=False)
        found = [item for item in json.loads(done.stdout)["findings"] if item["check"] == "training"]
        assert [item["level"] for item in found] == ["ok", "ok"], done.stdout
        assert f"process {pid}" in found[0]["what"]
    done = subprocess.run(doctor, capture_output=True, text=True, check=False)
    assert "training" not in [item["check"] for item in json.loads(done.stdout)["findings"]]
