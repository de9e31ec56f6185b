"""The contract of `NoticeSource` over the sources that ask a service, over real HTTP, and the trouble that all of them meet."""

import contextlib
import logging
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from contracts.sources import SOON, Listen, Service, also_at, left
from spotguard.notices import AwsSource, AzureSource, NoticeSource
from spotguard.testing import NoticeSourceContract
from spotguard.testing.metadata import FakeAws, FakeAzure


class TestOverHttp(NoticeSourceContract):
    @pytest.fixture
    def new_source(self, service: Service) -> Callable[[], NoticeSource]:
        return service.source

    @pytest.fixture
    def announce(self, service: Service) -> Callable[[], None]:
        return service.announce

    @pytest.fixture
    def withdraw(self, service: Service) -> Callable[[], None]:
        return service.take_back

    @pytest.fixture
    def fail(self, service: Service) -> Callable[[], None]:
        return lambda: service.fake.fail_next(503, times=3)

    @pytest.fixture
    def settle(self, service: Service) -> Callable[[], None]:
        return lambda: service.settle(4)

    @pytest.fixture(params=["the next look", "an answer"])
    def idle_source(self, service: Service, request: pytest.FixtureRequest) -> Iterator[NoticeSource]:
        if request.param == "the next look":
            if service.name == "google":
                service.fake._second_s = 1.0  # it waits for the change, in earnest
            yield service.source(interval=60.0)
        else:
            with socket.create_server(("127.0.0.1", 0)) as silent:
                yield service.source(f"http://127.0.0.1:{silent.getsockname()[1]}")


def test_an_interruption_is_a_stop_and_a_preemption(service: Service, listen: Listen) -> None:
    service.announce()
    notice = listen(service.source()).wait()
    assert (notice.source, notice.kind, notice.action) == (service.name, "preemption", "stop")


@pytest.mark.parametrize("service", ["aws", "azure", "url"], indirect=True)
def test_one_that_comes_late_leaves_what_is_left(service: Service, listen: Listen) -> None:
    service.announce(in_s=15)
    notice = listen(service.source()).wait()
    assert 2 < left(notice) <= 16  # times of day are told in whole seconds
    assert notice.firm


@pytest.mark.parametrize("status", [400, 401, 404, 405, 410, 429, 500, 502, 503, 504])
def test_a_burst_of_errors_is_no_news_and_is_survived(service: Service, listen: Listen, status: int) -> None:
    service.fake.fail_next(status, times=3)
    listening = listen(service.source())
    service.fake.wait_for(4)
    assert listening.heard == []
    service.announce()
    assert listening.wait().action == "stop"


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"Events": 3}', "<html>", "\x00\xff", '{"a":' * 5000])
def test_nonsense_is_no_reason_to_stop_listening(service: Service, listen: Listen, text: str) -> None:
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


@pytest.mark.parametrize("service", ["google", "azure", "url"], indirect=True)
def test_where_access_is_denied_for_a_while_is_survived_too(service: Service, listen: Listen) -> None:
    service.fake.fail_next(403, times=3)
    listening = listen(service.source())
    service.fake.wait_for(4)
    assert listening.heard == []
    service.announce()
    assert listening.wait().action == "stop"


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed(service: Service, listen: Listen, status: int) -> None:
    elsewhere = Service(service.name)
    with elsewhere.fake:
        elsewhere.announce()
        service.fake.fail_next(status, times=3, headers={"Location": f"{elsewhere.fake.endpoint}/"})
        listening = listen(service.source())
        service.fake.wait_for(3)
        assert elsewhere.fake.requests == []
        assert listening.heard == []


def test_a_proxy_is_never_asked(service: Service, listen: Listen, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    service.announce()
    assert listen(service.source()).wait().action == "stop"


def test_a_service_that_refuses_connections_is_no_news_and_is_heard_when_it_is_there(
    service: Service, listen: Listen, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))  # and nobody listens there
        port = reserved.getsockname()[1]
        listening = listen(service.source(f"http://127.0.0.1:{port}"))
        until = time.monotonic() + 10
        while "refused" not in caplog.text and time.monotonic() < until:
            time.sleep(SOON)
    assert "refused" in caplog.text
    assert listening.heard == []
    service.announce()
    with also_at(service.fake, "127.0.0.1", port):
        assert listening.wait().action == "stop"


def test_a_service_that_does_not_answer_holds_nobody_up(service: Service, listen: Listen) -> None:
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
    service: Service, listen: Listen, caplog: pytest.LogCaptureFixture
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


def test_two_sources_at_once_are_one_notice_that_of_the_earlier_deadline(listen: Listen) -> None:
    with FakeAws() as aws, FakeAzure(limit=10_000) as azure:
        aws.interrupt(in_s=120)
        azure.schedule("Preempt", in_s=30)
        listening = listen(AwsSource(aws.endpoint, SOON), AzureSource(azure.endpoint, SOON))
        listening.wait(2)
        assert listening.watcher.notice is not None
        assert listening.watcher.notice.source == "azure"


def test_a_connection_is_kept_from_one_question_to_the_next_and_made_anew_when_the_service_hangs_up(
    service: Service, listen: Listen
) -> None:
    accepted: list[socket.socket] = []
    accept = service.fake._server.get_request

    def keep() -> Any:
        found = accept()
        accepted.append(found[0])
        return found

    service.fake._server.get_request = keep
    listening = listen(service.source())
    service.settle(6)
    assert len(accepted) <= 2, "the two keys of Google are two questions at once"
    for connection in accepted:
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
    service.announce()
    assert listening.wait().action == "stop"


@pytest.mark.parametrize("service", ["aws", "azure", "url"], indirect=True)
def test_it_is_heard_over_ipv6(service: Service, listen: Listen) -> None:
    with also_at(service.fake, "::1") as address:
        service.announce()
        assert listen(service.source(f"http://{address}")).wait().action == "stop"
