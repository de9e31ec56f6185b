"""The contract of `NoticeSource` over a file, and what a file and a URL of somebody's own may say."""

import datetime as dt
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from contracts.sources import SOON, FakeUrl, Listen, left
from spotguard.notices import FileSource, NoticeSource, UrlSource
from spotguard.notices.metadata import MetadataClient
from spotguard.testing import NoticeSourceContract
from tls import behind_tls, make_certificate


class TestFileSource(NoticeSourceContract):
    """`fail` puts a link there that leads to itself: nobody can say whether there is a file."""

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return tmp_path / "preempted"

    @pytest.fixture
    def new_source(self, path: Path) -> Callable[[], NoticeSource]:
        return lambda: FileSource(path, SOON)

    @pytest.fixture
    def announce(self, path: Path) -> Callable[[], None]:
        def write() -> None:
            path.unlink(missing_ok=True)
            path.write_text("drain")

        return write

    @pytest.fixture
    def withdraw(self, path: Path) -> Callable[[], None]:
        return path.unlink

    @pytest.fixture
    def fail(self, path: Path) -> Callable[[], None]:
        def loop() -> None:
            (path.parent / "loop").unlink(missing_ok=True)
            (path.parent / "loop").symlink_to(path)
            (path.parent / "loop").replace(path)

        return loop

    @pytest.fixture
    def idle_source(self, path: Path) -> NoticeSource:
        return FileSource(path, 60.0)


def test_a_file_is_a_notice_and_its_removal_the_end_of_it(tmp_path: Path, listen: Listen) -> None:
    path = tmp_path / "preempted"
    listening = listen(FileSource(path, SOON))
    path.write_text("whatever")
    assert (listening.wait().deadline, listening.wait().detail) == (None, str(path))
    path.unlink()
    assert listening.wait(2).action == "withdrawn"


def test_a_file_may_say_how_long_and_what(tmp_path: Path, listen: Listen) -> None:
    instant = dt.datetime.now(dt.timezone.utc) + dt.timedelta(seconds=200)
    path = tmp_path / "preempted"
    path.write_text(json.dumps({"grace": "30s", "deadline": instant.isoformat(), "action": "save", "detail": "drill"}))
    notice = listen(FileSource(path, SOON)).wait()
    assert 28 < left(notice) <= 31
    assert (notice.action, notice.detail) == ("save", "drill")


@pytest.mark.parametrize("text", ["", '{"action": "sa'])
def test_a_file_that_is_being_written_is_waited_for(tmp_path: Path, listen: Listen, text: str) -> None:
    path = tmp_path / "preempted"
    path.write_text(text)
    listening = listen(FileSource(path, SOON))
    time.sleep(5 * SOON)
    path.write_text('{"action": "save"}')
    assert listening.wait().action == "save"
    assert [one.action for one in listening.heard] == ["save"]


@pytest.mark.parametrize("text", ["", "{", '{"action": "sa'])
def test_and_is_a_stop_where_it_stays_so(tmp_path: Path, listen: Listen, text: str) -> None:
    path = tmp_path / "preempted"
    path.write_text(text)
    assert listen(FileSource(path, SOON)).wait().action == "stop"


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=lambda make: make.__name__)
def test_whatever_is_there_in_place_of_a_file_is_a_stop_and_holds_nobody_up(
    tmp_path: Path, listen: Listen, make: Callable[[Path], None]
) -> None:
    make(tmp_path / "preempted")
    assert listen(FileSource(tmp_path / "preempted", SOON)).wait().action == "stop"


def test_a_file_that_is_written_anew_is_read_anew(tmp_path: Path, listen: Listen) -> None:
    path = tmp_path / "preempted"
    path.write_text('{"action": "save"}')
    os.utime(path, (1, 1))  # long settled
    listening = listen(FileSource(path, SOON))
    assert listening.wait().action == "save"
    time.sleep(3 * SOON)
    path.write_text('{"action": "stop"}')
    assert listening.wait(2).action == "stop"


def test_a_file_of_long_ago_is_not_heeded(tmp_path: Path, listen: Listen) -> None:
    path = tmp_path / "preempted"
    path.write_text('{"deadline": "2017-09-18T08:22:00Z"}')
    listening = listen(FileSource(path, SOON))
    time.sleep(5 * SOON)
    assert listening.heard == []
    path.write_text('{"grace": "30s"}')
    assert listening.wait().action == "stop"


def test_a_url_may_say_how_long_and_what(listen: Listen) -> None:
    with FakeUrl() as fake:
        fake.notice = {"action": "save", "detail": "drain at noon", "grace": "nonsense"}
        listening = listen(UrlSource(f"{fake.endpoint}/notice?job=17", SOON, {"Authorization": "Bearer x"}))
        notice = listening.wait()
        assert (notice.action, notice.detail, notice.deadline) == ("save", "drain at noon", None)
        assert fake.requests[0].query == {"job": ["17"]}
        assert fake.requests[0].headers["authorization"] == "Bearer x"
        fake.notice = {"action": "none"}
        assert listening.wait(2).action == "withdrawn"


@pytest.mark.parametrize(("seconds_ago", "heard"), [(20, True), (3600, False)], ids=["a moment ago", "an hour ago"])
def test_a_url_may_name_a_time_that_has_passed(listen: Listen, seconds_ago: float, heard: bool) -> None:
    with FakeUrl() as fake:
        instant = dt.datetime.now(dt.timezone.utc) - dt.timedelta(seconds=seconds_ago)
        fake.notice = {"action": "stop", "deadline": instant.isoformat()}
        listening = listen(UrlSource(f"{fake.endpoint}/notice", SOON))
        if heard:
            assert left(listening.wait()) < 1
            assert not listening.heard[0].firm
        else:
            fake.wait_for(4)
            assert listening.heard == []


@pytest.mark.parametrize("fields", [{}, {"deadline": None}, {"deadline": "soon"}, {"deadline": 7}])
def test_a_url_need_not_name_a_time(listen: Listen, fields: dict[str, object]) -> None:
    with FakeUrl() as fake:
        fake.notice = {"action": "stop", **fields}
        notice = listen(UrlSource(f"{fake.endpoint}/notice", SOON)).wait()
        assert (notice.deadline, notice.grace) == (None, None)


def test_a_url_that_is_not_found_has_no_notice(listen: Listen) -> None:
    with FakeUrl() as fake:
        fake.notice = {"action": "stop"}
        listening = listen(UrlSource(f"{fake.endpoint}/notice", SOON))
        listening.wait()
        fake.fail_next(404)
        assert listening.wait(2).action == "withdrawn"


def test_a_url_behind_tls_is_asked_and_one_that_nobody_vouches_for_is_not(
    tmp_path: Path, listen: Listen, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = make_certificate(tmp_path)
    with FakeUrl() as fake, behind_tls(fake.endpoint, certificate) as endpoint:
        fake.notice = {"action": "stop"}
        with pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED"):
            MetadataClient(endpoint).get("/notice")
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        listening = listen(UrlSource(f"{endpoint}/notice", SOON))
        assert listening.wait().action == "stop"
        fake.wait_for(len(fake.requests) + 3)
        listening.watcher.close()


def test_a_url_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="write an address such as"):
        UrlSource("scheduler/notice")
