"""Does a signal reach the training: told from processes as the kernel shows them."""

import signal
import subprocess
import sys

import pytest

from spotguard.ops.doctor.process import (
    Process,
    ancestors,
    examine_ancestors,
    examine_ranks,
    examine_signals,
    read_process,
)

TERM, USR1 = frozenset({signal.SIGTERM}), frozenset({signal.SIGUSR1})


def shell(*command: str, pid: int = 1, caught: frozenset[int] = frozenset()) -> Process:
    return Process(pid, 0 if pid == 1 else 1, "sh", command, caught)


def levels(*processes: Process, first: Process | None = None, in_container: bool = True) -> dict[str, str]:
    found = examine_ancestors(list(processes), first or processes[-1], in_container=in_container)
    return {finding.check: finding.level for finding in found}


@pytest.mark.parametrize(
    ("command", "script"),
    [
        (("sh", "-c", "python train.py"), "python train.py"),
        (("/bin/bash", "-euo", "pipefail", "-c", "python train.py"), "pipefail"),  # a script all the same
        (("bash", "-lc", "python train.py"), "python train.py"),
        (("bash", "train.sh", "-c", "config.yaml"), "train.sh"),
        (("/bin/bash", "--norc", "start"), "start"),
        (("-bash",), ""),
        (("bash", "-i"), ""),
        (("sh",), ""),
    ],
)
def test_a_shell_with_something_to_run_is_told_from_one_that_somebody_types_into(
    command: tuple[str, ...], script: str
) -> None:
    assert shell(*command).script == script


def test_a_shell_as_process_1_is_a_problem_and_one_that_gives_way_is_not() -> None:
    assert levels(shell("sh", "-c", "python train.py"))["pid-1"] == "problem"
    assert levels(shell("sh", "-c", "spotguard doctor && exec python train.py"))["pid-1"] == "info"
    assert levels(shell("sh", "-c", "python train.py & wait", caught=TERM))["pid-1"] == "warning"
    assert levels(shell("sh"))["pid-1"] == "warning"


def test_an_init_as_process_1_is_fine() -> None:
    for name in ("systemd", "tini", "docker-init", "dumb-init"):
        assert levels(Process(1, 0, name))["pid-1"] == "ok"


def test_another_program_as_process_1_is_worth_a_word_in_a_container_only() -> None:
    assert levels(Process(1, 0, "python3"))["pid-1"] == "info"
    assert levels(Process(1, 0, "process"), in_container=False)["pid-1"] == "ok"


def test_a_script_above_us_is_named_and_a_terminal_is_not() -> None:
    script, terminal = shell("bash", "train.sh", pid=7), shell("-bash", pid=8)
    init = Process(1, 0, "systemd")
    assert levels(terminal, init)["parents"] == "ok"
    assert levels(script, terminal, init)["parents"] == "warning"
    (finding,) = (
        item for item in examine_ancestors([script, init], init, in_container=False) if item.check == "parents"
    )
    assert "train.sh" in finding.what
    assert "exec" in finding.fix


def test_without_proc_it_is_said_that_nothing_can_be_said() -> None:
    found = examine_ancestors([], None, in_container=False)
    assert [finding.level for finding in found] == ["info", "ok"]


def test_our_own_ancestors_lead_to_process_1() -> None:
    above = ancestors()
    assert above[-1].pid == 1
    assert read_process() is not None
    assert read_process(2**22 + 1) is None


WAITS = (
    "import signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2]); print('ready'); sys.stdin.read()"
)


def test_what_a_parent_has_ignored_and_blocked_is_read_of_a_real_process() -> None:
    command = ["/bin/sh", "-c", 'trap "" USR1; exec "$@"', "sh", sys.executable, "-uc", WAITS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        process = read_process(child.pid)
        child.communicate()
    assert process is not None
    assert signal.SIGUSR1 in process.ignored
    assert process.blocked == {signal.SIGUSR2}
    assert signal.SIGINT in process.caught  # Python's own
    found = {
        finding.what.split()[0]: finding.level for finding in examine_signals(process, wanted=("SIGUSR1", "SIGUSR2"))
    }
    assert found == {"SIGUSR1": "warning", "SIGUSR2": "problem"}


def test_a_handler_that_is_there_already_is_named() -> None:
    previous = signal.signal(signal.SIGTERM, theirs)
    try:
        found = examine_signals(read_process())
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert [finding.level for finding in found] == ["info", "ok"]
    assert "theirs" in found[0].what


C_HANDLER = """
import ctypes, signal
from spotguard.ops.doctor.process import examine_signals, read_process
libc = ctypes.CDLL(None)
libc.signal(15, ctypes.cast(libc.abs, ctypes.c_void_p))
print(*[finding.what for finding in examine_signals(read_process()) if finding.level == "info"], sep="\\n")
"""


def test_a_handler_that_a_c_library_has_set_is_found() -> None:
    found = subprocess.run([sys.executable, "-c", C_HANDLER], capture_output=True, text=True, check=True).stdout
    assert found.splitlines() == [
        "SIGTERM has a handler that was not set in Python; ours takes its place, and cannot call it"
    ]


def theirs(number: int, frame: object) -> None:
    """Somebody else's."""


def test_a_sigterm_that_is_ignored_is_heard_all_the_same_and_a_signal_that_the_platform_sends_is_not() -> None:
    ignoring = Process(5, 1, "python", ignored=TERM | USR1)
    assert [finding.level for finding in examine_signals(ignoring)] == ["info", "ok"]
    assert [finding.level for finding in examine_signals(ignoring, wanted=("SIGUSR1",))] == ["info", "warning"]


def test_several_ranks_are_a_problem_in_this_release() -> None:
    assert [finding.level for finding in examine_ranks({"WORLD_SIZE": "8"})] == ["problem"]
    for fine in ({}, {"WORLD_SIZE": "1"}, {"WORLD_SIZE": ""}):
        assert examine_ranks(fine) == []
