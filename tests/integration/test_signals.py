"""Real signals to real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from integration.scripts import PRELUDE, Script, logged, newest_step
from spotguard import CheckpointStore
from spotguard.stores import LocalObjectStore

WAITS_IN_STEP_3 = """
with guarded() as guard:
    for step in guard.steps(1000):
        if step == 3:
            say("ready")
            sys.stdin.readline()
            say("released")
"""

STUCK_IN_C = """
import ctypes
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
with guarded() as guard:
    for step in guard.steps(1000):
        libc.pthread_mutex_lock(mutex)
        say("ready")
        libc.pthread_mutex_lock(mutex)  # never returns, and no signal wakes it: a collective whose peer is gone
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_is_heard_inside_a_step_and_the_step_is_finished_and_committed(
    tmp_path: Path, number: signal.Signals
) -> None:
    with Script(WAITS_IN_STEP_3, tmp_path) as script:
        script.wait_for("ready")
        script.send(number)
        script.wait_for(f"notice {number.name}")  # while the main thread still sits in its step
        script.release()
        assert script.end() == (143, ["released"])
    assert newest_step(tmp_path) == 4
    assert [event["detail"] for event in logged(tmp_path, "NoticeReceived")] == [number.name]
    assert [event["checkpoint"] for event in logged(tmp_path, "Stopped")] == ["0001-0000000004"]


@pytest.mark.parametrize(("asked", "status"), [("signal", 0), ("object", 143)])
def test_only_a_signal_of_a_platform_that_starts_again_by_itself_is_answered_by_0(
    tmp_path: Path, asked: str, status: int
) -> None:
    with Script(WAITS_IN_STEP_3, tmp_path, SPOTGUARD_POLL_S="0.02", TRAINING_JOB_NAME="mine") as script:
        script.wait_for("ready")
        if asked == "signal":
            script.send(signal.SIGTERM)
            script.wait_for("notice SIGTERM")
        else:
            with LocalObjectStore(tmp_path).create("stop"):
                pass
            script.wait_for("notice a request to stop")
        script.release()
        assert script.end() == (status, ["released"])
    assert newest_step(tmp_path) == 4
    assert json.loads((tmp_path / "exit.json").read_text())["exit_code"] == status


def test_a_stop_object_does_the_same_and_is_consumed(tmp_path: Path) -> None:
    store = LocalObjectStore(tmp_path)
    with Script(WAITS_IN_STEP_3, tmp_path, SPOTGUARD_POLL_S="0.02", SPOTGUARD_EXIT_CODE="85") as script:
        script.wait_for("ready")
        with store.create("stop"):
            pass
        script.wait_for("notice a request to stop")
        script.release()
        assert script.end() == (85, ["released"])
    assert newest_step(tmp_path) == 4
    assert store.stat("stop") is None


@pytest.mark.parametrize(("first", "second"), [(signal.SIGTERM, signal.SIGTERM), (signal.SIGTERM, signal.SIGINT)])
def test_a_second_signal_ends_the_process_at_once_though_the_main_thread_is_stuck(
    tmp_path: Path, first: signal.Signals, second: signal.Signals
) -> None:
    with Script(STUCK_IN_C, tmp_path, SPOTGUARD_REPEAT_S="0") as script:
        script.wait_for("ready")
        script.send(first)
        script.wait_for(f"notice {first.name}")
        script.send(second)
        assert script.end() == (128 + second, [])
    assert newest_step(tmp_path) is None


SLOW_TO_SAVE = """
import os, signal, sys, time
import torch
import spotguard.guard.departure as departure
from spotguard import SpotGuard, TrainState
from spotguard.stores import LocalObjectStore

class Slow(LocalObjectStore):
    def create(self, key, **how):
        if key.startswith("checkpoints/"):
            time.sleep(float(sys.argv[2]))
        return super().create(key, **how)

departure._LONG_S = 0.5
with SpotGuard(Slow(sys.argv[1]), TrainState(model=torch.nn.Linear(1, 1))) as guard:
    for step in guard.steps(10):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
"""


@pytest.mark.parametrize("seconds", [0, 1])
def test_whoever_waits_for_a_long_last_save_is_told_how_to_leave(tmp_path: Path, seconds: float) -> None:
    command = [sys.executable, "-c", SLOW_TO_SAVE, str(tmp_path / "run"), str(seconds)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 143, run.stderr
    told = "the last save is taking its time; another signal leaves at once, with no checkpoint" in run.stderr
    assert told == bool(seconds)


def test_a_signal_that_is_delivered_twice_is_one_notice(tmp_path: Path) -> None:
    with Script(WAITS_IN_STEP_3, tmp_path, SPOTGUARD_REPEAT_S="3600") as script:
        script.wait_for("ready")
        script.send(signal.SIGTERM)
        script.wait_for("notice SIGTERM")
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            script.send(number)
        script.release()
        assert script.end() == (143, ["released"])
    assert len(logged(tmp_path, "NoticeReceived")) == 1


def test_an_interrupt_that_was_ignored_from_outside_stays_ignored(tmp_path: Path) -> None:
    with Script(WAITS_IN_STEP_3, tmp_path, ignore="INT", SPOTGUARD_REPEAT_S="0") as script:
        script.wait_for("ready")
        script.send(signal.SIGINT)
        script.send(signal.SIGTERM)
        script.wait_for("notice SIGTERM")
        script.send(signal.SIGINT)
        script.release()
        assert script.end() == (143, ["released"])
    assert [event["detail"] for event in logged(tmp_path, "NoticeReceived")] == ["SIGTERM"]


FORKS = """
def before(number, frame):
    say("previous handler in", "child" if os.getpid() != parent else "parent")

parent = os.getpid()
signal.signal(signal.SIGTERM, before)
with guarded() as guard:
    for step in guard.steps(100):
        if step == 3:
            child = os.fork()
            if child == 0:
                say("handler is the previous one:", signal.getsignal(signal.SIGTERM) is before)
                say("interrupt is the default:", signal.getsignal(signal.SIGINT) is signal.default_int_handler)
                os.kill(os.getpid(), signal.SIGTERM)
                os._exit(0)
            os.waitpid(child, 0)
        time.sleep(0.001)
"""


def test_a_forked_child_has_the_previous_handlers_and_sends_no_notice(tmp_path: Path) -> None:
    with Script(FORKS, tmp_path) as script:
        status, lines = script.end()
    assert status == 0
    assert lines == ["handler is the previous one: True", "interrupt is the default: True", "previous handler in child"]
    assert logged(tmp_path, "NoticeReceived") == []


LEAVES_FORKED = """
with guarded() as guard:
    for step in guard.steps(10):
        if step == 3:
            child = os.fork()
            if child == 0:
                sys.exit(7)  # unwinds through the guard of the parent
            say("child left with", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_child_may_leave_through_the_guard_of_its_parent(tmp_path: Path) -> None:
    with Script(LEAVES_FORKED, tmp_path) as script:
        assert script.end() == (0, ["child left with 7"])
    assert newest_step(tmp_path) == 10


LOADS_WITH_WORKERS = """
import multiprocessing

class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 1000
    def __getitem__(self, index):
        return torch.tensor([float(index)] * 2)

def main():
    loader = torch.utils.data.DataLoader(Data(), batch_size=2, num_workers=2)
    with guarded() as guard:
        for epoch in guard.epochs(1):
            for number, batch in enumerate(guard.batches(loader)):
                say("begin", number)
                if number == 3:
                    say("ready")
                    sys.stdin.readline()
                    workers = multiprocessing.active_children()
                    say("workers alive:", sum(worker.is_alive() for worker in workers))
                say("end", number)

main()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_to_the_whole_group_leaves_the_workers_to_finish_the_step(
    tmp_path: Path, number: signal.Signals
) -> None:
    with Script(LOADS_WITH_WORKERS, tmp_path) as script:
        script.wait_for("ready")
        os.killpg(script.process.pid, number)
        script.wait_for(f"notice {number.name}")
        script.release()
        assert script.end() == (143, ["workers alive: 2", "end 3"])
        assert newest_step(tmp_path) == 4
        assert group_is_gone(script.process.pid)


def group_is_gone(group: int) -> bool:
    for _ in range(500):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2], ids=lambda number: number.name)
def test_in_a_job_of_slurm_the_user_signals_are_notices_too(tmp_path: Path, number: signal.Signals) -> None:
    with Script(WAITS_IN_STEP_3, tmp_path, SLURM_JOB_ID="7") as script:
        script.wait_for("ready")
        script.send(number)
        script.wait_for(f"notice {number.name}")
        script.release()
        assert script.end() == (143, ["released"])
    assert newest_step(tmp_path) == 4


CHILDREN = """
import multiprocessing, subprocess

def sleep():
    time.sleep(600)

with guarded() as guard:
    for step in guard.steps(1000):
        if step == 3:
            process = multiprocessing.get_context("fork").Process(target=sleep)
            process.start()
            popen = subprocess.Popen(["sleep", "600"])
            process.terminate()
            popen.terminate()
            process.join()
            say("gone", process.exitcode, popen.wait())
            sys.stdin.readline()
"""


def test_signals_to_children_of_multiprocessing_and_popen_end_them_and_are_no_notice_here(tmp_path: Path) -> None:
    with Script(CHILDREN, tmp_path) as script:
        script.wait_for("gone -15 -15")
        script.send(signal.SIGTERM)  # and this one is
        script.wait_for("notice SIGTERM")
        script.release()
        assert script.end() == (143, [])
    assert len(logged(tmp_path, "NoticeReceived")) == 1


CHILDREN_AT_ONCE = """
with guarded() as guard:
    lost = 0
    for _ in range(300):
        if (pid := os.fork()) == 0:
            time.sleep(5)
            os._exit(0)
        os.kill(pid, signal.SIGTERM)  # the child may not even have run yet
        lost += os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != -signal.SIGTERM
        if lost:
            break
    say("lost", lost)
    say("blocked", *signal.pthread_sigmask(signal.SIG_BLOCK, []))
"""


def test_a_signal_to_a_child_that_was_forked_a_moment_ago_is_not_lost(tmp_path: Path) -> None:
    with Script(CHILDREN_AT_ONCE, tmp_path) as script:
        script.wait_for("lost 0")
        script.wait_for("blocked")
        assert script.end()[0] == 0


MANY_FILES = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
files = [open(os.devnull) for _ in range(1100)]
"""


def test_a_signal_is_heard_in_a_process_with_more_than_1024_open_files(tmp_path: Path) -> None:
    with Script(MANY_FILES + WAITS_IN_STEP_3, tmp_path) as script:
        script.wait_for("ready")
        script.send(signal.SIGTERM)
        script.wait_for("notice SIGTERM")
        script.release()
        assert script.end() == (143, ["released"])


def test_another_signal_than_the_first_is_another_notice_and_does_not_end_the_process(tmp_path: Path) -> None:
    with Script(WAITS_IN_STEP_3, tmp_path, SLURM_JOB_ID="7", SPOTGUARD_REPEAT_S="0") as script:
        script.wait_for("ready")
        script.send(signal.SIGUSR1)
        script.wait_for("notice SIGUSR1")
        script.send(signal.SIGTERM)
        script.wait_for("notice SIGTERM")
        script.release()
        assert script.end() == (143, ["released"])
    assert newest_step(tmp_path) == 4


def test_the_same_user_signal_again_ends_the_process_at_once(tmp_path: Path) -> None:
    with Script(STUCK_IN_C, tmp_path, SLURM_JOB_ID="7", SPOTGUARD_REPEAT_S="0", SPOTGUARD_EXIT_CODE="85") as script:
        script.wait_for("ready")
        script.send(signal.SIGUSR1)
        script.wait_for("notice SIGUSR1")
        script.send(signal.SIGUSR1)
        assert script.end() == (128 + signal.SIGUSR1, []), "nothing was saved: it is no stop of ours"


ASYNCIO_IN_THE_LOOP = """
import asyncio

async def main():
    asyncio.get_running_loop().add_signal_handler(signal.SIGWINCH, lambda: None)

with guarded() as guard:
    for step in guard.steps(1000):
        if step == 3:
            asyncio.run(main())
            say("descriptor", signal.set_wakeup_fd(-1))
            say("ready")
            for _ in sys.stdin:
                pass
"""


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_without_the_wakeup_descriptor_a_signal_is_heard_at_once_and_so_is_a_second_one(
    tmp_path: Path, second: signal.Signals
) -> None:
    with Script(ASYNCIO_IN_THE_LOOP, tmp_path, SPOTGUARD_REPEAT_S="0") as script:
        script.wait_for("descriptor -1")
        script.wait_for("ready")
        script.send(signal.SIGTERM)
        script.wait_for("notice SIGTERM")
        script.send(second)
        assert script.end()[0] == 128 + second


EXITS_IN_ITS_HANDLER = """
def leave(number, frame):
    say("previous handler")
    sys.exit(0)

signal.signal(signal.SIGTERM, leave)
"""


def test_a_handler_that_was_there_before_and_exits_does_not_tear_the_step(tmp_path: Path) -> None:
    with Script(EXITS_IN_ITS_HANDLER + WAITS_IN_STEP_3, tmp_path) as script:
        script.wait_for("ready")
        script.send(signal.SIGTERM)
        said = [script.line(), script.line()]
        assert sorted(said) == ["notice SIGTERM", "previous handler"]
        script.release()
        assert script.end() == (143, ["released"])
    assert newest_step(tmp_path) == 4


SIGNAL_IN_THE_LAST_STEP = """
with guarded() as guard:
    for step in guard.steps(5):
        if step == 4:
            os.kill(os.getpid(), getattr(signal, os.environ["NUMBER"]))
say("goes on")
"""


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 85), (signal.SIGINT, -signal.SIGINT)], ids=["stopped", "interrupted"]
)
def test_a_signal_that_comes_after_the_last_boundary_is_not_swallowed(
    tmp_path: Path, number: signal.Signals, status: int
) -> None:
    with Script(SIGNAL_IN_THE_LAST_STEP, tmp_path, NUMBER=number.name, SPOTGUARD_EXIT_CODE="85") as script:
        assert script.end() == (status, [f"notice {number.name}"])
    assert newest_step(tmp_path) == 5
    assert CheckpointStore(tmp_path).list()[-1].manifest.finished


def test_and_goes_to_the_handler_that_was_there_before_once(tmp_path: Path) -> None:
    answers = "signal.signal(signal.SIGTERM, lambda *_: say('previous handler'))\n"
    with Script(answers + SIGNAL_IN_THE_LAST_STEP, tmp_path, NUMBER="SIGTERM") as script:
        status, lines = script.end()
    assert status == 0
    assert sorted(lines) == ["goes on", "notice SIGTERM", "previous handler"]


def test_and_what_that_handler_raised_in_the_step_it_raises_behind_it(tmp_path: Path) -> None:
    with Script(
        EXITS_IN_ITS_HANDLER.replace("exit(0)", "exit(7)") + SIGNAL_IN_THE_LAST_STEP, tmp_path, NUMBER="SIGTERM"
    ) as script:
        status, lines = script.end()
    assert status == 7
    assert "goes on" not in lines
    assert CheckpointStore(tmp_path).list()[-1].manifest.finished


def test_process_1_of_a_container_ends_on_it_as_well(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(PRELUDE + SIGNAL_IN_THE_LAST_STEP)
    command = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc"]
    if subprocess.run([*command, "true"], capture_output=True, check=False).returncode:
        pytest.skip("namespaces cannot be made here")
    done = subprocess.run(
        [*command, sys.executable, tmp_path / "train.py", tmp_path / "run"],
        env={**os.environ, "NUMBER": "SIGTERM"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (143, "notice SIGTERM\n"), done.stderr


OWN_HANDLER_THEN_FORK = """
mine = lambda *_: None
with guarded() as guard:
    for step in guard.steps(5):
        if step == 3:
            signal.signal(signal.SIGTERM, mine)
            if (child := os.fork()) == 0:
                say("mine", signal.getsignal(signal.SIGTERM) is mine)
                say("default", signal.getsignal(signal.SIGINT) is signal.default_int_handler)
                os._exit(0)
            os.waitpid(child, 0)
"""


def test_a_forked_child_keeps_a_handler_that_was_set_inside_the_block(tmp_path: Path) -> None:
    with Script(OWN_HANDLER_THEN_FORK, tmp_path) as script:
        assert script.end() == (0, ["mine True", "default True"])


WAKEUP_DESCRIPTOR_REUSED = """
import tempfile
reader, writer = os.pipe()
os.set_blocking(writer, False)
signal.set_wakeup_fd(writer)
signal.signal(signal.SIGTERM, lambda *_: None)
with guarded() as guard:
    for step in guard.steps(5):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            say("forwarded", os.read(reader, 1))
            file = tempfile.TemporaryFile()
            os.dup2(file.fileno(), writer)  # closed, and its number taken, at once: a writer thread opens files too
            os.kill(os.getpid(), signal.SIGTERM)
            guard._session._hearing._signals.wake()
            time.sleep(0.2)
            say("written", os.fstat(writer).st_size)
            os._exit(0)
"""


def test_nothing_is_written_into_a_file_that_has_the_number_of_a_wakeup_descriptor_that_was_closed(
    tmp_path: Path,
) -> None:
    with Script(WAKEUP_DESCRIPTOR_REUSED, tmp_path, SPOTGUARD_REPEAT_S="3600") as script:
        script.wait_for("forwarded b'\\x0f'")
        script.wait_for("written 0")


HANDLER_OF_C = """
import faulthandler
faulthandler.register(signal.SIGUSR1, file=sys.stdout)
with guarded() as guard:
    for step in guard.steps(5):
        pass
os.kill(os.getpid(), signal.SIGUSR1)
say("alive")
"""


def test_a_handler_that_is_none_of_pythons_is_put_back(tmp_path: Path) -> None:
    with Script(HANDLER_OF_C, tmp_path, SLURM_JOB_ID="7") as script:
        status, lines = script.end()
    assert (status, lines[-1]) == (0, "alive")
    assert "most recent call first" in lines[0]
