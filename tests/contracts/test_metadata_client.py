"""How services are asked: HTTP over one connection, and when to ask again."""

import threading

import pytest

from contracts.sources import Raw
from spotguard.notices.metadata import MetadataClient, Poller


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
