"""What every test has to leave as it found it."""

import gc
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from servers import azurite, gcs, moto, seaweedfs

__all__ = ["azurite", "gcs", "moto", "seaweedfs"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_LONG = ("equivalence", "integration", "packaging")
_PATIENCE = 5.0  # seconds for threads that are on their way out

if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # started in the background of a script; whatever a test starts would have it so, too
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Accelerate collects garbage at the start of a training. In a child most of what it looks through for seconds is its parent's.
os.register_at_fork(after_in_child=gc.freeze)


@pytest.fixture(autouse=True)
def signal_handlers_are_put_back() -> Iterator[None]:
    """Fail on a signal handler that is left behind."""
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    yield
    left = {number.name: signal.getsignal(number) for number in _SIGNALS if signal.getsignal(number) != before[number]}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert not left, f"signal handlers left behind: {left}"


@pytest.fixture(autouse=True)
def wakeup_descriptor_is_put_back() -> Iterator[None]:
    """Fail on a wakeup descriptor that is left behind."""
    before = _wakeup_descriptor()
    yield
    after = _wakeup_descriptor()
    signal.set_wakeup_fd(before)
    assert after == before, f"the wakeup descriptor was {before} and is {after}"


@pytest.fixture(autouse=True)
def environment_is_put_back() -> Iterator[None]:
    """Fail on ``SPOTGUARD_*`` that is set before a test, or left behind by one."""
    assert not _settings(), "unset these before running the tests"
    yield
    left = _settings()
    for name in left:
        del os.environ[name]
    assert not left, f"environment left behind: {left}"


@pytest.fixture(autouse=True)
def threads_are_ended() -> Iterator[None]:
    """Fail on a thread of ours that is left behind."""
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + _PATIENCE
    ours = [thread for thread in threading.enumerate() if thread.name.startswith("spotguard-") and thread not in before]
    for thread in ours:
        thread.join(max(0.0, deadline - time.monotonic()))
    left = [thread.name for thread in ours if thread.is_alive()]
    assert not left, f"threads left behind: {left}"


def _wakeup_descriptor() -> int:
    descriptor = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(descriptor)
    return descriptor


def _settings() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("SPOTGUARD_")}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long ones first, and those that wait for processes among those that compute: the machine has work all along."""
    totals = Counter(item.path.parent.name for item in items)
    seen = Counter[str]()

    def place(item: pytest.Item) -> float:
        folder = item.path.parent.name
        seen[folder] += 1
        return seen[folder] / totals[folder] if folder in _LONG else 2.0

    items.sort(key=place)


def pytest_collection_finish() -> None:
    """What has been imported stays: neither we nor a forked child need look through it for garbage again and again."""
    gc.collect()
    gc.freeze()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where to write the matrix of features that come back exactly."""
    parser.addoption(
        "--matrix", metavar="PAGE", help="write what tests recorded as a feature into the table of this page"
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print what tests have counted with `record_property`: crash points, power cuts, failing calls. And the matrix."""
    if (page := config.getoption("--matrix")) is not None:
        _write_matrix(Path(page), terminalreporter)
    totals: dict[str, int] = {}
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties if report.when == "call" else ():
            if isinstance(value, int):
                totals[name] = totals.get(name, 0) + value
    if totals:
        terminalreporter.section("counted")
        for name, value in totals.items():
            terminalreporter.line(f"{name}: {value}")


def _write_matrix(page: Path, terminalreporter: pytest.TerminalReporter) -> None:
    """One row for each feature, one column for each test of it."""
    found: dict[tuple[int, str], dict[str, str]] = {}
    for outcome, word in (("passed", "yes"), ("failed", "**no**")):
        for report in terminalreporter.getreports(outcome):
            properties = dict(report.user_properties) if report.when == "call" else {}
            if "feature" in properties:
                number, feature = properties["feature"]
                found.setdefault((number, feature), {})[str(properties["column"])] = word
    columns = sorted({column for row in found.values() for column in row})
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    lines += [
        f"| {name} | " + " | ".join(row.get(column, "?") for column in columns) + " |"
        for (_, name), row in sorted(found.items())
    ]
    before, _, rest = page.read_text().partition("<!-- matrix -->\n")
    _, _, after = rest.partition("<!-- end -->")
    page.write_text(before + "<!-- matrix -->\n" + "\n".join(lines) + "\n<!-- end -->" + after)
