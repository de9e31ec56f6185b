"""A signal is noticed wherever the main thread is: in a C call, in the compiler, in the loader, among its imports."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from integration.scripts import Script, logged, newest_step

RELEASABLE = """
import ctypes, threading
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)

def stick():  # a C call that no signal wakes, until a line comes
    libc.pthread_mutex_lock(mutex)
    threading.Thread(target=lambda: (sys.stdin.readline(), libc.pthread_mutex_unlock(mutex)), daemon=True).start()
    say("ready")
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_unlock(mutex)
    say("released")
"""

IN_A_C_CALL = """
with guarded() as guard:
    for step in guard.steps(1000):
        if step == 3:
            stick()
"""

IN_THE_COMPILER = """
def backend(graph, inputs):
    stick()
    return graph.forward

@torch.compile(backend=backend)
def step_of_training(x):
    return x * 2 + 1

with guarded() as guard:
    for step in guard.steps(1000):
        if step == 3:
            step_of_training(torch.ones(2))
"""

IN_THE_LOADER = """
class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 100
    def __getitem__(self, index):
        if index == 3:
            stick()
        return torch.zeros(1)

with guarded() as guard:
    for epoch in guard.epochs(1):
        for batch in guard.batches(torch.utils.data.DataLoader(Data())):
            pass
"""

WAITING_FOR_WORKERS = """
class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 100
    def __getitem__(self, index):
        if index == 3:
            say("ready")
            while not os.path.exists(sys.argv[1] + "/go"):
                time.sleep(0.01)
            say("released")
        return torch.zeros(1)

with guarded() as guard:
    for epoch in guard.epochs(1):
        for batch in guard.batches(torch.utils.data.DataLoader(Data(), num_workers=1, prefetch_factor=1)):
            pass
"""

STOPS_WITH_THE_STEP = {"a C call": IN_A_C_CALL, "torch.compile": IN_THE_COMPILER, "next(loader)": IN_THE_LOADER}


@pytest.mark.parametrize("code", STOPS_WITH_THE_STEP.values(), ids=STOPS_WITH_THE_STEP.keys())
def test_a_signal_is_noticed_while_the_main_thread_is_in(code: str, tmp_path: Path) -> None:
    with Script(RELEASABLE + code, tmp_path) as script:
        script.wait_for("ready")
        script.send(signal.SIGTERM)
        script.wait_for("notice SIGTERM")  # and the call goes on
        script.release()
        status, lines = script.end()
    assert (status, lines[0]) == (143, "released")
    assert newest_step(tmp_path) == 4


def test_a_signal_is_noticed_while_the_loop_waits_for_its_workers(tmp_path: Path) -> None:
    with Script(WAITING_FOR_WORKERS, tmp_path) as script:
        script.wait_for("ready")
        script.send(signal.SIGTERM)
        script.wait_for("notice SIGTERM")
        (tmp_path / "go").touch()
        status, lines = script.end()
    assert (status, lines) == (143, ["released"])
    assert len(logged(tmp_path, "NoticeReceived")) == 1


EARLY = "import spotguard.early\n"
IMPORTING = """
import os, sys
os.write(1, b"ready\\n")
sys.stdin.readline()  # as if it were a long import
"""
TRAINS = """
with guarded() as guard:
    for step in guard.steps(1000):
        say("trained")
say("finished")
"""
PROCESS_1 = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc")
CAN_BE_PROCESS_1 = subprocess.run([*PROCESS_1, "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize(
    "under",
    [(), pytest.param(PROCESS_1, marks=pytest.mark.skipif(not CAN_BE_PROCESS_1, reason="no namespaces here"))],
    ids=["any process", "process 1"],
)
def test_a_signal_that_comes_among_the_imports_is_recorded_and_nothing_is_trained(
    under: tuple[str, ...], tmp_path: Path
) -> None:
    with Script(TRAINS, tmp_path, first=EARLY + IMPORTING, under=under) as script:
        script.wait_for("ready")
        (script.send_to_child if under else script.send)(signal.SIGTERM)
        script.release()
        assert script.end() == (143, ["notice SIGTERM"])
    assert newest_step(tmp_path) is None


@pytest.mark.skipif(not CAN_BE_PROCESS_1, reason="no namespaces here")
def test_a_signal_to_process_1_that_nobody_hears_is_lost_which_is_why_there_is_a_recorder(tmp_path: Path) -> None:
    with Script(TRAINS, tmp_path, first=IMPORTING, under=PROCESS_1) as script:
        script.wait_for("ready")
        script.send_to_child(signal.SIGTERM)
        script.release()
        status, lines = script.end()
    assert (status, lines[-1]) == (0, "finished")


def test_without_the_recorder_a_signal_among_the_imports_ends_any_other_process(tmp_path: Path) -> None:
    with Script(TRAINS, tmp_path, first=IMPORTING) as script:
        script.wait_for("ready")
        script.send(signal.SIGTERM)
        assert script.end() == (-signal.SIGTERM, [])


TWICE = """
import time
os.write(1, b"ready\\n")
time.sleep(1.1)  # sooner, it would be the same stop
sys.stdin.readline()
os.write(1, b"again\\n")
sys.stdin.readline()
"""


def test_a_second_signal_ends_a_script_that_has_not_come_to_its_guard(tmp_path: Path) -> None:
    with Script("", tmp_path, first=EARLY + IMPORTING + TWICE) as script:
        script.wait_for("ready")
        script.send(signal.SIGTERM)
        script.release()
        script.wait_for("ready")
        script.release()
        script.wait_for("again")
        script.send(signal.SIGTERM)
        assert script.end() == (-signal.SIGTERM, [])


TWO_GUARDS = """
for number in (1, 2):
    try:
        with SpotGuard(f"{sys.argv[1]}/{number}", TrainState(model=torch.nn.Linear(2, 2))) as guard:
            for step in guard.steps(5):
                pass
        say("finished")
    except SystemExit as left:
        say("left with", left.code)
say("default again:", signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)
"""


def test_what_was_recorded_is_answered_once_and_the_default_is_put_back(tmp_path: Path) -> None:
    with Script(TWO_GUARDS, tmp_path, first=EARLY + IMPORTING) as script:
        script.wait_for("ready")
        script.send(signal.SIGTERM)
        script.release()
        assert script.end() == (0, ["left with 143", "finished", "default again: True"])


PUT_BACK_BEHIND_THE_GUARD = """
ours = signal.getsignal(signal.SIGTERM)
with guarded() as guard:
    for step in guard.steps(5):
        pass
signal.signal(signal.SIGTERM, ours)  # as Lightning does, that has seen it before the guard
say("ready")
sys.stdin.readline()
"""


def test_a_recorder_that_is_put_back_behind_the_guard_does_not_swallow_signals(tmp_path: Path) -> None:
    with Script(PUT_BACK_BEHIND_THE_GUARD, tmp_path, first=EARLY) as script:
        script.wait_for("ready")
        script.send(signal.SIGTERM)
        assert script.end() == (-signal.SIGTERM, [])


CHILDREN = """
import spotguard.early
import multiprocessing, os, signal, sys, time

def sleep():
    time.sleep(600)

if __name__ == "__main__":
    for method in ("fork", "spawn", "forkserver"):
        process = multiprocessing.get_context(method).Process(target=sleep)
        process.start()
        if method != "fork":
            time.sleep(0.5)
        process.terminate()
        process.join()
        print(method, process.exitcode)
    lost = 0
    for _ in range(100):
        if (pid := os.fork()) == 0:
            time.sleep(5)
            os._exit(0)
        os.kill(pid, signal.SIGTERM)
        lost += os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != -signal.SIGTERM
        if lost:
            break
    print("lost", lost)
    print("blocked", *signal.pthread_sigmask(signal.SIG_BLOCK, []))
"""


def test_signals_to_children_that_are_started_before_the_guard_end_them(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(CHILDREN)
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert run.stdout.split("\n")[:-1] == ["fork -15", "spawn -15", "forkserver -15", "lost 0", "blocked"]


def test_a_handler_that_is_there_before_the_recorder_is_left_alone() -> None:
    code = """
import signal
def mine(number, frame): print("mine")
signal.signal(signal.SIGTERM, mine)
import spotguard.early
assert signal.getsignal(signal.SIGTERM) is mine
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_recorder_loads_nothing_but_what_python_has_loaded() -> None:
    code = "import sys; before = set(sys.modules); import spotguard.early; print(*sorted(set(sys.modules) - before))"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    ours = [name for name in run.stdout.split() if name.startswith("spotguard")]
    assert ours == ["spotguard", "spotguard.early"]
    assert "torch" not in run.stdout
    assert "pydantic" not in run.stdout
