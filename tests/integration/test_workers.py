"""Workers of data loaders: they live through a stop, end with the process that started them, and what they start is as free as anywhere."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

PATIENCE = 30.0  # seconds until something that should come is an error

SCRIPT = """
import multiprocessing, os, signal, subprocess, sys, time
import torch
from spotguard import SpotGuard, TrainState

def ended(pid, number):
    os.kill(pid, number)
    for _ in range(500):
        if (found := os.waitpid(pid, os.WNOHANG))[0]:
            return os.waitstatus_to_exitcode(found[1])
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def program(number):
    return ended(subprocess.Popen(["sleep", "60"]).pid, number)

def fork(number):
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        os.write(writer, b"!")
        time.sleep(60)
        os._exit(0)
    os.read(reader, 1)
    return ended(pid, number)

class Data(torch.utils.data.Dataset):
    def __init__(self, of):
        self.of = of
    def __len__(self):
        return 4
    def __getitem__(self, index):
        return self.of(index)

def starts(index):
    return torch.tensor([program(signal.SIGTERM), program(signal.SIGINT), fork(signal.SIGTERM)])

def waits(index):
    while index > 0 and not os.path.exists("go"):
        time.sleep(0.01)
    return torch.tensor(os.getpid())

def run(of, leave, method="fork"):
    global batches, guard  # they outlive the loop
    loader = torch.utils.data.DataLoader(
        Data(of), batch_size=1, num_workers=1, multiprocessing_context=multiprocessing.get_context(method)
    )
    with SpotGuard(sys.argv[1], TrainState(model=torch.nn.Linear(2, 2)), every=10**9, notices="none") as guard:
        batches = iter(guard.batches(loader))
        print(*next(batches).flatten().tolist(), flush=True)
        leave()

def fail():
    raise ValueError("the loss is NaN")

if __name__ == "__main__":
    exec(sys.argv[2])
"""


class Training:
    """The script, with all that it starts."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def end(self) -> int:
        return self.process.wait(PATIENCE)


@contextlib.contextmanager
def start(tmp_path: Path, code: str) -> Iterator[Training]:
    (tmp_path / "train.py").write_text(SCRIPT)
    command = [sys.executable, "train.py", str(tmp_path / "run"), code]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            yield Training(process)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def is_gone(pid: int) -> bool:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


METHODS = ["fork", "spawn", "forkserver"]


@pytest.mark.parametrize("method", METHODS[:2])
def test_what_a_worker_starts_can_be_ended_by_a_signal(tmp_path: Path, method: str) -> None:
    with start(tmp_path, f"run(starts, lambda: None, {method!r})") as training:
        assert training.line().split() == ["-15", "-2", "-15"]
        assert training.end() == 0


@pytest.mark.parametrize(
    ("method", "leave", "status"),
    [
        *((method, "fail", 1) for method in METHODS),
        ("fork", "lambda: os._exit(7)", 7),
        ("spawn", "lambda: os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
    ],
)
def test_a_worker_that_is_stuck_ends_with_the_process_that_started_it(
    tmp_path: Path, method: str, leave: str, status: int
) -> None:
    with start(tmp_path, f"run(waits, {leave}, {method!r})") as training:
        worker = int(training.line())
        assert training.end() == status
        assert is_gone(worker)


def test_so_it_does_where_that_process_was_itself_started_by_multiprocessing(tmp_path: Path) -> None:
    code = """
process = multiprocessing.get_context("fork").Process(target=run, args=(waits, fail))
process.start()
process.join()
sys.exit(process.exitcode)
"""
    with start(tmp_path, code) as training:
        worker = int(training.line())
        assert training.end() == 1
        assert is_gone(worker)


@pytest.mark.parametrize("method", METHODS)
def test_a_signal_to_every_process_leaves_a_worker_to_its_work(tmp_path: Path, method: str) -> None:
    with start(tmp_path, f"run(waits, lambda: print(*next(batches).tolist(), flush=True), {method!r})") as training:
        worker = int(training.line())
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            os.kill(worker, number)
        (tmp_path / "go").touch()
        assert int(training.line()) == worker
        assert training.end() == 0
