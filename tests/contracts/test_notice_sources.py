"""What every source of notices has to do, over real HTTP, and what each service has of its own."""

import contextlib
import datetime as dt
import email.utils
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import pytest

from spotguard.guard.budget import Budget
from spotguard.notices import (
    AwsSource,
    AzureSource,
    FileSource,
    GoogleSource,
    NoticeSource,
    NoticeWatcher,
    PollingSource,
    PreemptionNotice,
    UrlSource,
)
from spotguard.notices.metadata import MetadataClient, Poller
from spotguard.notices.platforms import Platform
from spotguard.testing._service import Service as Fake
from spotguard.testing.metadata import FakeAws, FakeAzure, FakeGoogle, Reply, Request
from tls import behind_tls, make_certificate

if TYPE_CHECKING:
    from typing_extensions import Self

SOON = 0.02  # seconds between two questions


class FakeUrl(Fake):
    """A scheduler of somebody's own."""

    notice: dict[str, Any] | None = None

    def answer(self, request: Request) -> Reply:
        return Reply(204) if self.notice is None else Reply(200, json.dumps(self.notice))


class Raw:
    """A server that answers every request with the same bytes, and then hangs up, or holds the line."""

    def __init__(self, text: bytes, *, hold: bool = False) -> None:
        self.accepted = 0
        self._text, self._hold = text, hold
        self._over = threading.Event()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def _serve(self) -> None:
        while not self._over.is_set():
            connection, _ = self._socket.accept()
            with connection, contextlib.suppress(OSError):
                self.accepted += 1
                if connection.recv(65536):
                    connection.sendall(self._text)
                    self._over.wait(10 if self._hold else 0)

    def __enter__(self) -> "Self":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        socket.create_connection(self._socket.getsockname()).close()  # it may wait for one
        self._thread.join(10)
        self._socket.close()


@contextlib.contextmanager
def over_ipv6(fake: Any) -> Iterator[str]:
    """Another address of the same fake."""

    class Server(ThreadingHTTPServer):
        address_family = socket.AF_INET6
        daemon_threads = True

    with Server(("::1", 0), fake._server.RequestHandlerClass) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield f"[::1]:{server.server_address[1]}"
        server.shutdown()
        thread.join()


class Listening:
    """A source that is watched, and what it has said."""

    def __init__(self, *sources: NoticeSource) -> None:
        self.heard: list[PreemptionNotice] = []
        self._news = threading.Condition()
        self.watcher = NoticeWatcher(self._take)
        for source in sources:
            self.watcher.watch(source)

    def _take(self, notice: PreemptionNotice) -> None:
        with self._news:
            self.heard.append(notice)
            self._news.notify_all()

    def wait(self, count: int = 1) -> PreemptionNotice:
        with self._news:
            assert self._news.wait_for(lambda: len(self.heard) >= count, 20), self.heard
            return self.heard[count - 1]


@pytest.fixture
def listen() -> Iterator[Callable[..., Listening]]:
    open_now: list[Listening] = []

    def start(*sources: NoticeSource) -> Listening:
        open_now.append(Listening(*sources))
        return open_now[-1]

    yield start
    for one in open_now:
        one.watcher.close()
        assert [thread for thread in one.watcher._threads if thread.is_alive()] == [], "it would hold up the exit"


class Service:
    """A cloud, its source, and how it says that we have to go."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.fake: Any = {"aws": FakeAws, "google": FakeGoogle, "azure": FakeAzure, "url": FakeUrl}[name]()
        if name == "azure":
            self.fake.limit = 10_000

    def source(self, endpoint: str | None = None) -> Any:
        where = endpoint or self.fake.endpoint
        if self.name == "aws":
            return AwsSource(where, SOON)
        if self.name == "google":
            return GoogleSource(where, floor=SOON)
        if self.name == "azure":
            return AzureSource(where, SOON)
        return UrlSource(f"{where}/notice", SOON)

    def announce(self) -> None:
        if self.name == "aws":
            self.fake.interrupt(in_s=120)
        elif self.name == "google":
            self.fake.preempt()
        elif self.name == "azure":
            self.fake.schedule("Preempt", in_s=30)
        else:
            self.fake.notice = {"action": "stop", "grace": "60s", "id": "7"}

    def take_back(self) -> None:
        if self.name == "url":
            self.fake.notice = None
        else:
            self.fake.clear()

    def settle(self, rounds: int = 3) -> None:
        """Let so many more questions be asked."""
        self.fake.wait_for(len(self.fake.requests) + rounds)


@pytest.fixture(params=["aws", "google", "azure", "url"])
def service(request: pytest.FixtureRequest) -> Iterator[Service]:
    made = Service(request.param)
    with made.fake:
        yield made


# -- what all have in common -------------------------------------------------------------------------------------------------------


def test_it_is_a_source_and_nothing_planned_is_no_notice(service: Service, listen: Callable[..., Listening]) -> None:
    source = service.source()
    assert isinstance(source, NoticeSource)
    listening = listen(source)
    service.settle(4 if service.name != "google" else 2)
    assert listening.heard == []


def test_a_notice_is_heard_once_however_often_it_is_told(service: Service, listen: Callable[..., Listening]) -> None:
    listening = listen(service.source())
    service.settle(2)
    service.announce()
    notice = listening.wait()
    assert (notice.source, notice.kind, notice.action) == (service.name, "preemption", "stop")
    assert notice.id
    service.settle(8 if service.name != "google" else 1)
    assert len(listening.heard) == 1


def test_one_that_was_told_before_we_came_is_heard(service: Service, listen: Callable[..., Listening]) -> None:
    service.announce()
    assert listen(service.source()).wait().action == "stop"


def test_what_is_withdrawn_is_withdrawn(service: Service, listen: Callable[..., Listening]) -> None:
    service.announce()
    listening = listen(service.source())
    first = listening.wait()
    service.take_back()
    second = listening.wait(2)
    assert (second.action, second.source, second.id) == ("withdrawn", first.source, first.id)
    assert listening.watcher.notice is None


@pytest.mark.parametrize("status", [400, 405, 410, 429, 500, 502, 503])
def test_a_burst_of_errors_is_no_news_and_is_survived(
    service: Service, listen: Callable[..., Listening], status: int
) -> None:
    service.fake.fail_next(status, times=3)
    listening = listen(service.source())
    service.fake.wait_for(4)
    assert listening.heard == []
    service.announce()
    assert listening.wait().action == "stop"


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"Events": 3}', "<html>", "\x00\xff", '{"a":' * 5000])
def test_nonsense_is_no_reason_to_stop_listening(service: Service, listen: Callable[..., Listening], text: str) -> None:
    flavor = {"Metadata-Flavor": "Google"}
    service.fake.fail_next(200, times=3, text=text, headers=flavor)
    listening = listen(service.source())
    service.fake.wait_for(4)
    service.take_back()
    service.announce()
    until = time.monotonic() + 20
    while not any(one.action == "stop" and one.deadline != 0 for one in listening.heard) and time.monotonic() < until:
        time.sleep(0.01)
    assert listening.watcher.notice is not None
    assert listening.watcher.notice.action == "stop"


def test_a_redirect_is_not_followed(service: Service, listen: Callable[..., Listening]) -> None:
    elsewhere = Service(service.name)
    with elsewhere.fake:
        elsewhere.announce()
        service.fake.fail_next(302, times=3, headers={"Location": f"{elsewhere.fake.endpoint}/"})
        listening = listen(service.source())
        service.fake.wait_for(3)
        assert elsewhere.fake.requests == []
        assert listening.heard == []


def test_a_proxy_is_never_asked(
    service: Service, listen: Callable[..., Listening], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    service.announce()
    assert listen(service.source()).wait().action == "stop"


def test_a_service_that_is_not_there_is_no_news(service: Service, listen: Callable[..., Listening]) -> None:
    listening = listen(service.source("http://127.0.0.1:1"))
    time.sleep(0.2)
    assert listening.heard == []


def test_a_service_that_does_not_answer_holds_nobody_up(service: Service, listen: Callable[..., Listening]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(10)
        listening = listen(service.source(f"http://127.0.0.1:{silent.getsockname()[1]}"))
        connection, _ = silent.accept()
        began = time.monotonic()
        listening.watcher.close()
        assert time.monotonic() - began < 1.5, "less than any of its timeouts"
        assert listening.heard == []
        connection.close()


def test_trouble_is_told_once_and_so_is_its_end(
    service: Service, listen: Callable[..., Listening], caplog: pytest.LogCaptureFixture
) -> None:
    service.fake.fail_next(503, times=4)
    with caplog.at_level(logging.INFO, logger="spotguard.notices"):
        listen(service.source())
        service.announce()
        service.fake.wait_for(8)
    told = [record.getMessage() for record in caplog.records]
    assert sum("answers again" in line for line in told) <= 2  # the two keys of Google are two questions
    assert 1 <= sum("no answer" in line for line in told) <= 2
    ours = [record for record in caplog.records if record.name.startswith("spotguard")]
    assert all(record.levelno <= logging.INFO for record in ours)


def test_two_sources_at_once_are_one_notice_that_of_the_earlier_deadline(listen: Callable[..., Listening]) -> None:
    with FakeAws() as aws, FakeAzure(limit=10_000) as azure:
        aws.interrupt(in_s=120)
        azure.schedule("Preempt", in_s=30)
        listening = listen(AwsSource(aws.endpoint, SOON), AzureSource(azure.endpoint, SOON))
        listening.wait(2)
        assert listening.watcher.notice is not None
        assert listening.watcher.notice.source == "azure"


def test_a_source_that_was_used_before_hears_as_well_the_second_time(
    service: Service, listen: Callable[..., Listening]
) -> None:
    source = service.source()
    service.announce()
    first = listen(source)
    first.wait()
    first.watcher.close()
    again = listen(source)
    assert again.wait().action == "stop", "what still stands is news to the second"
    service.take_back()
    assert again.wait(2).action == "withdrawn"
    service.announce()
    assert again.wait(3).action == "stop"


def test_a_connection_is_kept_from_one_question_to_the_next_and_made_anew_when_the_service_hangs_up(
    service: Service, listen: Callable[..., Listening]
) -> None:
    accepted: list[socket.socket] = []
    accept = service.fake._server.get_request

    def keep() -> Any:
        found = accept()
        accepted.append(found[0])
        return found

    service.fake._server.get_request = keep
    listening = listen(service.source())
    service.settle(6 if service.name != "google" else 2)
    assert len(accepted) <= 2, "the two keys of Google are two questions at once"
    for connection in accepted:
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
    service.announce()
    assert listening.wait().action == "stop"


@pytest.mark.parametrize("framing", ["chunked", "until the end", "HTTP/1.0"])
def test_an_answer_may_be_framed_in_any_way_of_http(framing: str) -> None:
    body = b'{"action": "stop"}'
    answers = {
        "chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n%b\r\n%x;x=y\r\n%b\r\n0\r\nTrailer: x\r\n\r\n"
        % (body[:5], len(body) - 5, body[5:]),
        "until the end": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n\r\n" + body,
        "HTTP/1.0": b"HTTP/1.0 200 OK\nContent-Length: %d\n\n%b" % (len(body), body),
    }
    with Raw(answers[framing]) as raw:
        client = MetadataClient(raw.endpoint)
        with client.watching():
            assert [client.get("/").text for _ in range(2)] == [body.decode()] * 2


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
        b"HTTP/1.1 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nlong\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nhalf",
        b"x" * 200_000,
    ],
)
def test_what_is_no_answer_is_an_oserror(text: bytes) -> None:
    with Raw(text) as raw, pytest.raises(OSError, match=r"no HTTP|hung up|reset"):
        MetadataClient(raw.endpoint).get("/")


def test_a_service_that_dribbles_is_not_listened_to_for_ever() -> None:
    with Raw(b"HTTP/1.1 200 OK\r\n", hold=True) as raw, pytest.raises(TimeoutError):
        MetadataClient(raw.endpoint, timeout=0.2).get("/")


def test_a_request_of_two_lines_is_refused() -> None:
    with pytest.raises(ValueError, match="no such request"):
        MetadataClient("http://127.0.0.1:1").get("/", {"Metadata": "true\r\nX-Forwarded-For: 10.0.0.1"})


def test_a_request_is_sent_as_often_as_it_was_said() -> None:
    with Raw(b"") as raw:
        with pytest.raises(ConnectionError):
            MetadataClient(raw.endpoint, attempts=3).get("/")
        assert raw.accepted == 3


@pytest.mark.parametrize("service", ["aws", "azure", "url"], indirect=True)
def test_it_is_heard_over_ipv6(service: Service, listen: Callable[..., Listening]) -> None:
    with over_ipv6(service.fake) as address:
        service.announce()
        assert listen(service.source(f"http://{address}")).wait().action == "stop"


def test_an_ipv6_address_without_a_port_is_not_cut_in_two() -> None:
    for scheme in ("http", "https"):
        with pytest.raises(ConnectionRefusedError):  # nothing listens there; it is no name that is not known
            MetadataClient(f"{scheme}://[::1]").get("/")


def test_after_a_failure_it_is_asked_again_in_a_second_and_then_ever_more_seldom(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits: list[float] = []

    class Stop(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout or 0.0)
            return len(waits) == 8

    def ask() -> float | None:
        if len(waits) in (0, 7):
            return None
        raise ConnectionError

    Poller("x", 5.0).run(ask, Stop())
    assert waits == [pytest.approx(one, rel=0.11) for one in (5, 1, 2, 4, 8, 16, 30, 5)]
    assert len({wait / round(wait) for wait in waits}) > 1, "no two machines in step"


def test_a_wall_clock_that_is_off_changes_nothing_where_the_service_says_what_time_it_is(
    listen: Callable[..., Listening],
) -> None:
    """The notice of 120 s is by a clock that is three minutes behind ours."""

    class Behind(FakeAws):
        def answer(self, request: Request) -> Reply:
            reply = super().answer(request)
            now = dt.datetime.now(dt.timezone.utc) - dt.timedelta(minutes=3)
            return reply._replace(headers={**reply.headers, "Date": email.utils.format_datetime(now, usegmt=True)})

    with Behind() as aws:
        aws.interrupt(in_s=120 - 180)
        notice = listen(AwsSource(aws.endpoint, SOON)).wait()
    assert 115 < left(notice) <= 121
    assert notice.firm


# -- EC2 ---------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def aws() -> Iterator[FakeAws]:
    with FakeAws() as fake:
        yield fake


def left(notice: PreemptionNotice) -> float:
    assert notice.deadline is not None
    return notice.deadline - notice.received


def test_the_deadline_is_the_time_of_the_notice(aws: FakeAws, listen: Callable[..., Listening]) -> None:
    aws.interrupt("stop", in_s=90)
    notice = listen(AwsSource(aws.endpoint, SOON)).wait()
    assert 85 < left(notice) <= 91
    assert "spot stop at" in notice.detail


@pytest.mark.parametrize(
    ("text", "least", "most"),
    [
        ('{"action": "terminate"}', 119, 121),
        ('{"action": "terminate", "time": "soon"}', 119, 121),
        ('{"action": "terminate", "time": 7}', 119, 121),
        ("not JSON at all", 119, 121),
        ('{"action": "hibernate", "time": "2099-09-18T08:22:00Z"}', 0, 1),
    ],
)
def test_whatever_stands_there_is_a_notice(
    aws: FakeAws, listen: Callable[..., Listening], text: str, least: float, most: float
) -> None:
    aws.items["spot/instance-action"] = text
    notice = listen(AwsSource(aws.endpoint, SOON)).wait()
    assert least - 0.5 <= left(notice) <= most


def test_a_notice_of_long_ago_that_still_stands_is_passed_over_with_one_warning(
    aws: FakeAws, listen: Callable[..., Listening], caplog: pytest.LogCaptureFixture
) -> None:
    aws.interrupt(in_s=-660)  # EC2 has not done it
    listening = listen(AwsSource(aws.endpoint, SOON))
    aws.wait_for(6, "instance-action")
    assert listening.heard == []
    assert sum("still stands" in record.getMessage() for record in caplog.records) == 1
    aws.interrupt(in_s=60)
    assert listening.wait().action == "stop"


@pytest.mark.parametrize(
    "text",
    [
        '{"action": "terminate", "time": "TIME"}',
        '{"action": "hibernate", "time": "TIME"}',
        '{"action": "terminate"}',
    ],
)
def test_what_is_due_already_or_is_a_guess_binds_nobody(
    aws: FakeAws, listen: Callable[..., Listening], text: str
) -> None:
    instant = dt.datetime.now(dt.timezone.utc) - dt.timedelta(seconds=20)
    aws.items["spot/instance-action"] = text.replace("TIME", instant.isoformat(timespec="seconds"))
    notice = listen(AwsSource(aws.endpoint, SOON)).wait()
    assert not notice.firm
    deadline = Budget(Platform("aws")).deadline_of(notice)
    assert deadline is not None
    assert not deadline.firm


def test_one_that_lies_ahead_is_firm(aws: FakeAws, listen: Callable[..., Listening]) -> None:
    aws.interrupt(in_s=60)
    deadline = Budget(Platform("aws")).deadline_of(listen(AwsSource(aws.endpoint, SOON)).wait())
    assert deadline is not None
    assert deadline.firm


@pytest.mark.parametrize(
    ("path", "status"),
    [("rebalance", 500), ("rebalance", 403), ("target-lifecycle-state", 403), ("maintenance", 503), ("termination", 0)],
)
def test_trouble_with_one_path_puts_off_no_other(listen: Callable[..., Listening], path: str, status: int) -> None:
    class Partly(FakeAws):
        def answer(self, request: Request) -> Reply:
            if path not in request.path:
                return super().answer(request)
            return Reply(status) if status else Reply(200, "no time at all")

    with Partly() as aws:
        listening = listen(AwsSource(aws.endpoint, SOON))
        aws.wait_for(20, "instance-action")
        assert sum(path in one.path for one in aws.requests) < 10
        aws.interrupt()
        assert listening.wait().kind == "preemption"


def test_the_notice_of_older_services_is_heard_where_there_is_no_other(
    aws: FakeAws, listen: Callable[..., Listening]
) -> None:
    instant = dt.datetime.now(dt.timezone.utc) + dt.timedelta(seconds=100)
    aws.items["spot/termination-time"] = instant.isoformat(timespec="seconds").replace("+00:00", "Z")
    listening = listen(AwsSource(aws.endpoint, SOON))
    assert 95 < left(listening.wait()) <= 101


def test_with_both_the_newer_one_is_heard(aws: FakeAws, listen: Callable[..., Listening]) -> None:
    aws.interrupt(in_s=100)
    aws.items["spot/termination-time"] = json.loads(aws.items["spot/instance-action"])["time"]
    listening = listen(AwsSource(aws.endpoint, SOON))
    aws.wait_for(2, "termination-time")
    assert [one.detail.partition(" at")[0] for one in listening.heard] == ["EC2: spot terminate"]


def test_a_token_that_is_still_good_is_used_while_there_is_no_new_one(listen: Callable[..., Listening]) -> None:
    class Stingy(FakeAws):
        def answer(self, request: Request) -> Reply:
            if request.method == "PUT" and self._tokens:
                return Reply(503)
            return super().answer(request)

    with Stingy() as aws:
        aws.lifetime_s = 50  # less than the minute that is kept in hand
        listening = listen(AwsSource(aws.endpoint, SOON))
        aws.wait_for(6, "instance-action")
        aws.interrupt()
        assert listening.wait().action == "stop"


@pytest.mark.parametrize("given", ["0.3", "soon", "-1", "nan"])
def test_the_patience_of_botocore_is_taken_over_where_it_makes_sense(
    listen: Callable[..., Listening], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, given: str
) -> None:
    monkeypatch.setenv("AWS_METADATA_SERVICE_TIMEOUT", given)
    monkeypatch.setenv("AWS_METADATA_SERVICE_NUM_ATTEMPTS", "2")
    with FakeAws(v2_only=False, hop_limit_hang=given == "0.3") as aws:
        began = time.monotonic()
        AwsSource(aws.endpoint).get("instance-type")
        assert (time.monotonic() - began) < 2.0
        asked = [one.method for one in aws.requests]
    assert asked == (["PUT", "PUT", "GET"] if given == "0.3" else ["PUT", "GET"])
    assert ("AWS_METADATA_SERVICE_TIMEOUT" in caplog.text) is (given != "0.3")


def test_an_expired_token_is_renewed_and_the_question_asked_again(
    aws: FakeAws, listen: Callable[..., Listening]
) -> None:
    listening = listen(AwsSource(aws.endpoint, SOON))
    aws.wait_for(5)
    aws.retire_tokens()
    aws.interrupt()
    assert listening.wait().action == "stop"
    assert sum(one.method == "PUT" for one in aws.requests) == 2


def test_a_token_is_renewed_before_it_expires(aws: FakeAws, listen: Callable[..., Listening]) -> None:
    aws.lifetime_s = 30  # less than the minute that is kept in hand
    listen(AwsSource(aws.endpoint, SOON))
    aws.wait_for(3, "/latest/api/token")


def test_a_service_that_is_switched_off_is_told_of_once_and_asked_again_much_later(
    listen: Callable[..., Listening], caplog: pytest.LogCaptureFixture
) -> None:
    with FakeAws(off=True) as aws:
        listening = listen(AwsSource(aws.endpoint, SOON))
        aws.wait_for(2)
        time.sleep(10 * SOON)
        assert len(aws.requests) == 2  # for a token, and without one
        assert listening.heard == []
    assert sum("switched off" in record.getMessage() for record in caplog.records) == 1


def test_where_tokens_hang_the_first_version_is_asked(listen: Callable[..., Listening]) -> None:
    with FakeAws(v2_only=False, hop_limit_hang=True) as aws:
        aws.interrupt()
        assert listen(AwsSource(aws.endpoint, SOON)).wait().action == "stop"


def test_where_tokens_hang_and_are_needed_the_hop_limit_is_told_of(
    listen: Callable[..., Listening], caplog: pytest.LogCaptureFixture
) -> None:
    with FakeAws(hop_limit_hang=True) as aws:
        listen(AwsSource(aws.endpoint, SOON))
        aws.wait_for(1, "instance-action")
        until = time.monotonic() + 10
        while "http-put-response-hop-limit 2" not in caplog.text and time.monotonic() < until:
            time.sleep(0.01)
    assert "http-put-response-hop-limit 2" in caplog.text


def test_without_the_first_version_nothing_is_asked_without_a_token(
    listen: Callable[..., Listening], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_V1_DISABLED", "true")
    with FakeAws(v2_only=False) as aws:
        aws.fail_next(404, times=3)
        listen(AwsSource(aws.endpoint, SOON))
        aws.wait_for(4)
        asked = [one.method for one in aws.requests[:4]]
    assert asked == ["PUT"] * 4


def test_the_variables_that_botocore_reads_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    assert AwsSource()._imds.client.base == "http://169.254.169.254"
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE", "IPv6")
    assert AwsSource()._imds.client.base == "http://[fd00:ec2::254]"
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://127.0.0.1:1338/")
    assert AwsSource()._imds.client.base == "http://127.0.0.1:1338/"


def test_where_it_is_disabled_nothing_is_asked(
    aws: FakeAws, listen: Callable[..., Listening], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", aws.endpoint)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "True")
    listening = listen(AwsSource(interval=SOON))
    listening.watcher._threads[0].join(10)
    assert not listening.watcher._threads[0].is_alive()
    assert aws.requests == []


def test_advice_to_rebalance_is_a_save(aws: FakeAws, listen: Callable[..., Listening]) -> None:
    aws.rebalance()
    notice = listen(AwsSource(aws.endpoint, SOON)).wait()
    assert (notice.kind, notice.action, notice.deadline) == ("rebalance", "save", None)


def test_maintenance_is_a_save_and_may_be_completed(aws: FakeAws, listen: Callable[..., Listening]) -> None:
    aws.maintain("system-reboot", in_s=3600)
    listening = listen(AwsSource(aws.endpoint, SOON))
    notice = listening.wait()
    assert (notice.kind, notice.action) == ("maintenance", "save")
    assert 3590 < left(notice) <= 3601
    aws.items["events/maintenance/scheduled"] = aws.items["events/maintenance/scheduled"].replace("active", "completed")
    assert listening.wait(2).action == "withdrawn"


def test_auto_scaling_that_takes_the_instance_is_a_notice_without_a_time_to_train_through(
    aws: FakeAws, listen: Callable[..., Listening]
) -> None:
    aws.items["autoscaling/target-lifecycle-state"] = "Terminated"
    listening = listen(AwsSource(aws.endpoint, SOON))
    notice = listening.wait()
    assert (notice.kind, notice.action, notice.deadline) == ("maintenance", "stop", None)
    aws.items["autoscaling/target-lifecycle-state"] = "InService"
    assert listening.wait(2).action == "withdrawn"


def test_the_fake_refuses_what_ec2_refuses(aws: FakeAws) -> None:
    client = MetadataClient(aws.endpoint)
    ttl = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    assert client.ask("PUT", "/latest/api/token").status == 400
    assert client.ask("PUT", "/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "99999"}).status == 400
    assert client.ask("PUT", "/2021-01-03/api/token", ttl).status == 403
    assert client.ask("PUT", "/latest/api/token", {**ttl, "X-Forwarded-For": "10.0.0.1"}).status == 403
    assert client.get("/latest/meta-data/instance-type").status == 401
    token = client.ask("PUT", "/latest/api/token", ttl).text
    assert client.get("/latest/meta-data/instance-type", {"X-aws-ec2-metadata-token": token}).text == "g5.xlarge"


# -- Compute Engine ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def google() -> Iterator[FakeGoogle]:
    with FakeGoogle() as fake:
        yield fake


def test_a_change_is_heard_by_the_poll_that_waits_for_it(google: FakeGoogle, listen: Callable[..., Listening]) -> None:
    listening = listen(GoogleSource(google.address))
    google.wait_for(2, "preempted")  # the second waits
    assert google.requests[-1].query.get("timeout_sec") == ["60"] or len(google.requests) > 2
    google.preempt()
    notice = listening.wait()
    assert (notice.grace, notice.deadline) == (30.0, None)


def test_the_duration_of_the_notice_is_added(google: FakeGoogle, listen: Callable[..., Listening]) -> None:
    google.preempt()
    assert listen(GoogleSource(google.address, notice_duration=120)).wait().grace == 150.0


@pytest.mark.parametrize("value", ["MIGRATE_ON_HOST_MAINTENANCE", "TERMINATE_ON_HOST_MAINTENANCE"])
def test_maintenance_of_the_host_is_a_save_and_may_be_withdrawn(
    google: FakeGoogle, listen: Callable[..., Listening], value: str
) -> None:
    listening = listen(GoogleSource(google.address, floor=SOON))
    google.maintain(value)
    assert (listening.wait().kind, listening.wait().action) == ("maintenance", "save")
    google.maintain("NONE")
    assert listening.wait(2).action == "withdrawn"


def test_a_key_that_is_not_there_yet_is_asked_for_seldom_and_heard_when_it_is(
    google: FakeGoogle, listen: Callable[..., Listening]
) -> None:
    google.put("preempted", None)
    google.put("maintenance-event", None)
    listening = listen(GoogleSource(google.address, floor=SOON))
    google.wait_for(6)
    google.preempt()
    assert listening.wait().kind == "preemption"


def test_how_often_a_key_may_be_missing_can_be_set(
    google: FakeGoogle, listen: Callable[..., Listening], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GCE_METADATA_DETECT_RETRIES", "1")
    google.put("preempted", None)
    google.put("maintenance-event", None)
    listen(GoogleSource(google.address, floor=0.5))
    google.wait_for(2)
    time.sleep(0.8)
    assert len(google.requests) == 2


def test_an_answer_of_somebody_else_is_no_news(listen: Callable[..., Listening]) -> None:
    class Portal(Fake):
        def answer(self, request: Request) -> Reply:
            return Reply(200, "TRUE")

    with Portal() as portal:
        listening = listen(GoogleSource(portal.address, floor=SOON))
        portal.wait_for(4)
        assert listening.heard == []


def test_a_server_that_does_not_wait_is_not_asked_in_a_hurry(
    google: FakeGoogle, listen: Callable[..., Listening]
) -> None:
    google._second_s = 0.0  # answers a long poll at once
    listen(GoogleSource(google.address, floor=0.5))
    google.wait_for(4)
    time.sleep(0.2)
    assert len(google.requests) <= 6


def test_where_the_name_of_the_server_is_not_known_its_address_is_asked(
    google: FakeGoogle, listen: Callable[..., Listening], monkeypatch: pytest.MonkeyPatch
) -> None:
    host, _, port = google.address.partition(":")
    monkeypatch.setattr("spotguard.notices.google._NAME", f"nobody.invalid:{port}")
    monkeypatch.setattr("spotguard.notices.google._ADDRESS", host)
    for name in ("GCE_METADATA_HOST", "GCE_METADATA_ROOT", "GCE_METADATA_IP"):
        monkeypatch.delenv(name, raising=False)
    google.preempt()
    assert listen(GoogleSource(floor=SOON)).wait().kind == "preemption"
    assert google.requests[0].headers["host"] == f"nobody.invalid:{port}"


def test_the_patience_of_googles_library_is_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GCE_METADATA_TIMEOUT", "0.2")
    with Raw(b"", hold=True) as raw, pytest.raises(TimeoutError):
        GoogleSource(raw.endpoint.removeprefix("http://")).get("instance/zone")


def test_a_mode_that_is_not_supported_is_told_of(
    google: FakeGoogle,
    listen: Callable[..., Listening],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("GCE_METADATA_MTLS_MODE", "strict")
    listen(GoogleSource(google.address))
    google.wait_for(1)
    assert "GCE_METADATA_MTLS_MODE=strict is not supported" in caplog.text


def test_the_fake_refuses_what_google_refuses(google: FakeGoogle) -> None:
    client, path = MetadataClient(google.endpoint), "/computeMetadata/v1/instance/preempted"
    flavor = {"Metadata-Flavor": "Google"}
    assert client.get(path).status == 403
    assert client.get(path, {**flavor, "X-Forwarded-For": "10.0.0.1"}).status == 403
    assert client.get("/computeMetadata/v1/instance/nothing", flavor).status == 404
    found = client.get(path, flavor)
    assert (found.status, found.text, found.headers["metadata-flavor"]) == (200, "FALSE", "Google")
    google._second_s = 0.01
    again = client.get(f"{path}?wait_for_change=true&timeout_sec=5&last_etag={found.headers['etag']}", flavor)
    assert (again.status, again.text) == (200, "FALSE"), "on timeout the value, unchanged"
    assert client.get(f"{path}?wait_for_change=true&timeout_sec=500000&last_etag=NONE", flavor).status == 200


# -- Azure -------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def azure() -> Iterator[FakeAzure]:
    with FakeAzure(limit=10_000) as fake:
        yield fake


@pytest.mark.parametrize(
    ("event_type", "kind", "action"),
    [
        ("Preempt", "preemption", "stop"),
        ("Terminate", "preemption", "stop"),
        ("Reboot", "maintenance", "stop"),
        ("Redeploy", "maintenance", "stop"),
        ("Freeze", "maintenance", "save"),
    ],
)
def test_what_each_event_asks_for(
    azure: FakeAzure, listen: Callable[..., Listening], event_type: str, kind: str, action: str
) -> None:
    azure.schedule(event_type, in_s=40)
    notice = listen(AzureSource(azure.endpoint, SOON)).wait()
    assert (notice.kind, notice.action) == (kind, action)
    assert 35 < left(notice) <= 41


def test_events_of_other_machines_are_none_of_ours(azure: FakeAzure, listen: Callable[..., Listening]) -> None:
    azure.schedule("Preempt", resources=("another",))
    listening = listen(AzureSource(azure.endpoint, SOON))
    azure.wait_for(4, "scheduledevents")
    assert listening.heard == []
    azure.schedule("Preempt", resources=("another", "MySpotVM"))
    assert listening.wait().action == "stop"


def test_an_event_that_begins_is_due_now_and_is_not_withdrawn_when_it_is_over(
    azure: FakeAzure, listen: Callable[..., Listening]
) -> None:
    event = azure.schedule("Freeze", in_s=900)
    listening = listen(AzureSource(azure.endpoint, SOON))
    listening.wait()
    azure.start(event)
    assert left(listening.wait(2)) < 1
    azure.withdraw(event)
    azure.wait_for(sum("scheduledevents" in one.path for one in azure.requests) + 3, "scheduledevents")
    assert len(listening.heard) == 2


@pytest.mark.parametrize("text", ["", "soon"])
def test_an_event_without_a_time_is_due_now(azure: FakeAzure, listen: Callable[..., Listening], text: str) -> None:
    azure.schedule("Preempt", text=text)
    assert left(listen(AzureSource(azure.endpoint, SOON)).wait()) < 1


def test_the_first_request_may_take_its_time(listen: Callable[..., Listening]) -> None:
    with FakeAzure(first_s=3.0) as azure:  # longer than any other request may take
        azure.schedule("Preempt")
        assert listen(AzureSource(azure.endpoint, SOON)).wait().action == "stop"
        assert sum("scheduledevents" in one.path for one in azure.requests) == 1


def test_an_event_of_ours_is_not_lost_where_our_name_cannot_be_asked_for(listen: Callable[..., Listening]) -> None:
    class Throttled(FakeAzure):
        throttling = False

        def answer(self, request: Request) -> Reply:
            return Reply(429) if self.throttling and "compute" in request.path else super().answer(request)

    with Throttled(limit=10_000) as azure:
        listening = listen(AzureSource(azure.endpoint, SOON))
        azure.wait_for(3, "scheduledevents")
        azure.compute["name"], azure.throttling = "renamed", True
        azure.schedule("Preempt")
        azure.wait_for(len(azure.requests) + 6)
        assert listening.heard == []
        azure.throttling = False
        assert listening.wait().action == "stop"


def test_an_event_that_may_begin_at_any_time_is_due_now_however_long_it_has_been(
    azure: FakeAzure, listen: Callable[..., Listening]
) -> None:
    azure.schedule("Preempt", in_s=-3600)
    notice = listen(AzureSource(azure.endpoint, SOON)).wait()
    assert left(notice) < 1
    assert not notice.firm


def test_an_event_is_acknowledged_only_on_request_and_where_it_is_ours_alone(
    azure: FakeAzure, listen: Callable[..., Listening]
) -> None:
    alone, shared = azure.schedule("Preempt"), azure.schedule("Reboot", resources=("myspotvm", "another"))
    silent, telling = AzureSource(azure.endpoint, SOON), AzureSource(azure.endpoint, SOON, acknowledge=True)
    for source in (silent, telling):
        listening = listen(source)
        listening.wait(2)
        for notice in listening.heard:
            source.confirm(notice)
    assert azure.approved == [alone]
    assert shared in azure.events


def test_the_fake_refuses_what_azure_refuses(azure: FakeAzure) -> None:
    client, path = MetadataClient(azure.endpoint), "/metadata/scheduledevents?api-version=2020-07-01"
    header = {"Metadata": "true"}
    assert client.get(path).status == 400
    assert client.get(path, {**header, "X-Forwarded-For": "10.0.0.1"}).status == 400
    assert client.get(f"{path}&api-version=2019-01-01", header).status == 400
    assert client.ask("POST", path, header, body=b"{}").status == 400
    azure.limit = 5
    assert [client.get(path, header).status for _ in range(12)].count(429) >= 1


# -- a file, a URL -----------------------------------------------------------------------------------------------------------------


def test_a_file_is_a_notice_and_its_removal_the_end_of_it(tmp_path: Path, listen: Callable[..., Listening]) -> None:
    path = tmp_path / "preempted"
    listening = listen(FileSource(path, SOON))
    path.write_text("whatever")
    assert (listening.wait().deadline, listening.wait().detail) == (None, str(path))
    path.unlink()
    assert listening.wait(2).action == "withdrawn"


def test_a_file_may_say_how_long_and_what(tmp_path: Path, listen: Callable[..., Listening]) -> None:
    instant = dt.datetime.now(dt.timezone.utc) + dt.timedelta(seconds=200)
    path = tmp_path / "preempted"
    path.write_text(json.dumps({"grace": "30s", "deadline": instant.isoformat(), "action": "save", "detail": "drill"}))
    notice = listen(FileSource(path, SOON)).wait()
    assert 28 < left(notice) <= 31
    assert (notice.action, notice.detail) == ("save", "drill")


@pytest.mark.parametrize("text", ["", '{"action": "sa'])
def test_a_file_that_is_being_written_is_waited_for(
    tmp_path: Path, listen: Callable[..., Listening], text: str
) -> None:
    path = tmp_path / "preempted"
    path.write_text(text)
    listening = listen(FileSource(path, SOON))
    time.sleep(5 * SOON)
    path.write_text('{"action": "save"}')
    assert listening.wait().action == "save"
    assert [one.action for one in listening.heard] == ["save"]


@pytest.mark.parametrize("text", ["", "{", '{"action": "sa'])
def test_and_is_a_stop_where_it_stays_so(tmp_path: Path, listen: Callable[..., Listening], text: str) -> None:
    path = tmp_path / "preempted"
    path.write_text(text)
    assert listen(FileSource(path, SOON)).wait().action == "stop"


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=lambda make: make.__name__)
def test_whatever_is_there_in_place_of_a_file_is_a_stop_and_holds_nobody_up(
    tmp_path: Path, listen: Callable[..., Listening], make: Callable[[Path], None]
) -> None:
    make(tmp_path / "preempted")
    assert listen(FileSource(tmp_path / "preempted", SOON)).wait().action == "stop"


def test_a_file_that_is_written_anew_is_read_anew(tmp_path: Path, listen: Callable[..., Listening]) -> None:
    path = tmp_path / "preempted"
    path.write_text('{"action": "save"}')
    os.utime(path, (1, 1))  # long settled
    listening = listen(FileSource(path, SOON))
    assert listening.wait().action == "save"
    time.sleep(3 * SOON)
    path.write_text('{"action": "stop"}')
    assert listening.wait(2).action == "stop"


def test_a_file_of_long_ago_is_not_heeded(tmp_path: Path, listen: Callable[..., Listening]) -> None:
    path = tmp_path / "preempted"
    path.write_text('{"deadline": "2017-09-18T08:22:00Z"}')
    listening = listen(FileSource(path, SOON))
    time.sleep(5 * SOON)
    assert listening.heard == []
    path.write_text('{"grace": "30s"}')
    assert listening.wait().action == "stop"


def test_a_url_may_say_how_long_and_what(listen: Callable[..., Listening]) -> None:
    with FakeUrl() as fake:
        fake.notice = {"action": "save", "detail": "drain at noon", "grace": "nonsense"}
        listening = listen(UrlSource(f"{fake.endpoint}/notice?job=17", SOON, {"Authorization": "Bearer x"}))
        notice = listening.wait()
        assert (notice.action, notice.detail, notice.deadline) == ("save", "drain at noon", None)
        assert fake.requests[0].query == {"job": ["17"]}
        assert fake.requests[0].headers["authorization"] == "Bearer x"
        fake.notice = {"action": "none"}
        assert listening.wait(2).action == "withdrawn"


def test_a_url_behind_tls_is_asked_and_one_that_nobody_vouches_for_is_not(
    tmp_path: Path, listen: Callable[..., Listening], monkeypatch: pytest.MonkeyPatch
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


def test_a_wall_clock_that_jumps_afterwards_changes_no_deadline(
    aws: FakeAws, listen: Callable[..., Listening], monkeypatch: pytest.MonkeyPatch
) -> None:
    aws.interrupt(in_s=120)
    listening = listen(AwsSource(aws.endpoint, SOON))
    listening.wait()
    real = time.time
    monkeypatch.setattr("time.time", lambda: real() + 86400)
    aws.wait_for(len(aws.requests) + 6)
    assert len(listening.heard) == 1
    assert left(listening.heard[0]) > 100


# -- a question of our own ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("costs_s", "seldom"), [(0.0, False), (0.02, True)])
def test_a_look_that_costs_much_is_taken_seldom(listen: Callable[..., Listening], costs_s: float, seldom: bool) -> None:
    looks: list[float] = []

    def look() -> None:
        looks.append(time.monotonic())
        until = time.thread_time() + costs_s
        while time.thread_time() < until:
            pass

    listening = listen()
    listening.watcher.watch(PollingSource("request", look, 0.001))
    time.sleep(1.0)
    assert (len(looks) == 1) is seldom
