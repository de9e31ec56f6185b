"""The contract of `NoticeSource` for sources of other people: one that is told, the one of the documentation, and broken ones."""

import contextlib
import re
import select
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event

import pytest

from contracts.sources import Listen
from spotguard.notices import NoticeSource, PreemptionNotice
from spotguard.testing import NoticeSourceContract

ROOT = Path(__file__).parents[2]


class Bell:
    """An agent of the machine rings it, and whoever has come waits for that. It asks nothing, and so has to be woken."""

    def __init__(self) -> None:
        self._lines: list[socket.socket] = []
        self._ringing = False

    def line(self) -> socket.socket:
        """A new line; what rings already is heard on it."""
        ours, theirs = socket.socketpair()
        self._lines.append(theirs)
        theirs.send(b"1" if self._ringing else b"")
        return ours

    def ring(self, *, ringing: bool) -> None:
        """Or stop it."""
        self._ringing = ringing
        self.say(b"1" if ringing else b"0")

    def say(self, word: bytes) -> None:
        """To all lines."""
        for line in self._lines:
            with contextlib.suppress(OSError):  # nobody listens to it any more
                line.send(word)

    def close(self) -> None:
        """Hang up."""
        for line in self._lines:
            line.close()


class BellSource:
    """Of a third party: waits for a word of an agent, and for nothing else."""

    name = "bell"

    def __init__(self, bell: Bell) -> None:
        self._bell = bell
        self._wake, self._woken = socket.socketpair()

    def __del__(self) -> None:
        self._wake.close()
        self._woken.close()

    def wake(self) -> None:
        self._wake.send(b"!")

    def watch(self, emit: Callable[[PreemptionNotice], None], stop: Event) -> None:
        notice = PreemptionNotice(
            source=self.name, kind="preemption", detail="the bell has rung", id="bell", grace=30.0
        )
        standing = False
        with self._bell.line() as line:
            while not stop.is_set():
                ready, _, _ = select.select([line, self._woken], [], [])
                if self._woken in ready:
                    self._woken.recv(16)
                for word in line.recv(16).decode() if line in ready else "":
                    if word == "1" and not standing:
                        emit(notice)
                    if word == "0" and standing:
                        emit(notice.withdrawn())
                    standing = {"1": True, "0": False}.get(word, standing)


class TestBellSource(NoticeSourceContract):
    """It is told, and never asks."""

    @pytest.fixture
    def bell(self) -> Iterator[Bell]:
        bell = Bell()
        yield bell
        bell.close()

    @pytest.fixture
    def new_source(self, bell: Bell) -> Callable[[], NoticeSource]:
        return lambda: BellSource(bell)

    @pytest.fixture
    def announce(self, bell: Bell) -> Callable[[], None]:
        return lambda: bell.ring(ringing=True)

    @pytest.fixture
    def withdraw(self, bell: Bell) -> Callable[[], None]:
        return lambda: bell.ring(ringing=False)

    @pytest.fixture
    def fail(self, bell: Bell) -> Callable[[], None]:
        return lambda: bell.say(b"?")


# -- the documentation -------------------------------------------------------------------------------------------------------------


def run_pytest(folder: Path, *options: str) -> str:
    """In a process of its own, with nothing of our suite around it."""
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", "-p", "no:randomly", *options]
    return subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True).stdout


def test_the_source_of_the_documentation_passes(tmp_path: Path) -> None:
    page = (ROOT / "docs/how-to/notice-sources.md").read_text()
    for name, text in re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE):
        (tmp_path / name).write_text(text)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["drain.py", "test_drain.py"]
    told = run_pytest(tmp_path)
    tests = [name for name in dir(NoticeSourceContract) if name.startswith("test_")]
    assert f"{len(tests)} passed in" in told, told


# -- what is broken is found -------------------------------------------------------------------------------------------------------

BROKEN = '''
import threading, time, uuid
import pytest
from spotguard import PreemptionNotice
from spotguard.testing import NoticeSourceContract


class Sound:
    """What is right, piece by piece."""

    name = "mine"

    def __init__(self, place):
        self.place, self.told = place, None

    def asked(self):
        if self.place.get("trouble"):
            self.place["trouble"] -= 1
            raise OSError("trouble")
        return self.place.get("asked")

    def look(self):
        try:
            return self.asked()
        except OSError:
            return self.told is not None

    def notice(self):
        return PreemptionNotice(source="mine", kind="preemption", detail="drained", id="7")

    def begin(self):
        self.told = None

    def watch(self, emit, stop):
        self.begin()
        while not stop.is_set():
            found = self.look()
            if found:
                self.told = self.notice()
                emit(self.told)
            elif self.told is not None:
                emit(self.told.withdrawn())
                self.told = None
            self.rest(stop)

    def rest(self, stop):
        stop.wait(0.01)


class Raises(Sound):
    def look(self):
        return self.asked()


class TakesTroubleForAYes(Sound):
    def look(self):
        try:
            return self.asked()
        except OSError:
            return True


class TakesTroubleForANo(Sound):
    def look(self):
        try:
            return self.asked()
        except OSError:
            return False


class HasNoId(Sound):
    def notice(self):
        return PreemptionNotice(source="mine", kind="preemption", detail="drained")


class HasAnIdForEachLook(Sound):
    def notice(self):
        return PreemptionNotice(source="mine", kind="preemption", detail="drained", id=uuid.uuid4().hex)


class HasAnotherName(Sound):
    def notice(self):
        return PreemptionNotice(source="yours", kind="preemption", detail="drained", id="7")


class TellsTheTimeOfDay(Sound):
    def notice(self):
        return PreemptionNotice(source="mine", kind="preemption", detail="drained", id="7", deadline=1790000000.0)


class IsDeafToTheEnd(Sound):
    def rest(self, stop):
        time.sleep(1.5 if stop.is_set() is False and self.place.setdefault("rests", 0) > 3 else 0.01)
        self.place["rests"] += 1


class NeverForgets(Sound):
    """Tells each notice once in its life."""

    def watch(self, emit, stop):
        while not stop.wait(0.01):
            if self.look() and self.told is None:
                self.told = self.notice()
                emit(self.told)


class SharesItsEnd(Sound):
    def watch(self, emit, stop):
        while not stop.is_set() and not self.place.get("ended"):
            if self.look():
                emit(self.notice())
            stop.wait(0.01)
        self.place["ended"] = True


class Contract(NoticeSourceContract):
    patience = 0.5

    @pytest.fixture
    def place(self):
        return {}

    @pytest.fixture
    def new_source(self, place):
        return lambda: self.kind(place)

    @pytest.fixture
    def announce(self, place):
        return lambda: place.update(asked=True, trouble=0)

    @pytest.fixture
    def withdraw(self, place):
        return lambda: place.update(asked=False)

    @pytest.fixture
    def fail(self, place):
        return lambda: place.update(trouble=3)


for kind in [Sound, *Sound.__subclasses__()]:
    globals()["Test" + kind.__name__] = type("Test" + kind.__name__, (Contract,), {"kind": kind})
'''

FOUND = {
    "Raises": "trouble_is_no_notice_and_one_after_it_is_heard",
    "TakesTroubleForAYes": "trouble_is_no_notice_and_one_after_it_is_heard",
    "TakesTroubleForANo": "trouble_takes_back_nothing_that_stands",
    "HasNoId": "it_is_a_notice_of_this_source_with_an_id",
    "HasAnIdForEachLook": "a_notice_is_heard_once_however_often_it_is_told",
    "HasAnotherName": "it_is_a_notice_of_this_source_with_an_id",
    "TellsTheTimeOfDay": "it_is_a_notice_of_this_source_with_an_id",
    "IsDeafToTheEnd": "it_ends_while_it_waits",
    "NeverForgets": "it_may_be_watched_by_one_guard_after_another",
    "SharesItsEnd": "one_that_ends_takes_nothing_from_another",
}


def test_what_is_broken_is_found_and_by_the_test_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "test_broken.py").write_text(BROKEN)
    wanted = {f"test_broken.py::Test{kind}::test_{test}" for kind, test in FOUND.items()}
    told = run_pytest(tmp_path, "test_broken.py::TestSound", *sorted(wanted))
    assert set(re.findall(r"^(?:FAILED|ERROR) (\S+)", told, re.MULTILINE)) == wanted, told


def test_a_class_that_forgets_a_fixture_is_told_which(tmp_path: Path) -> None:
    text = "from spotguard.testing import NoticeSourceContract\nclass TestMine(NoticeSourceContract): pass\n"
    (tmp_path / "test_mine.py").write_text(text)
    assert "a fixture 'new_source'" in run_pytest(tmp_path, "-k", "is_a_notice_source")


def test_a_watch_that_raises_is_named_at_once(listen: Listen) -> None:
    class Raising:
        name = "mine"

        def watch(self, emit: Callable[[PreemptionNotice], None], stop: Event) -> None:
            raise ZeroDivisionError

    listener = listen()
    listener.watch(Raising())
    with pytest.raises(AssertionError, match="mine: an exception came out"):
        listener.wait()
    listener._watched.clear()
