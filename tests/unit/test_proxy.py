"""Each fault of the proxy does to a request what it says, and to no other."""

import contextlib
import errno
import http.client
import http.server
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from servers import S3Server
from spotguard.errors import ConfigError
from spotguard.testing import (
    Call,
    Fault,
    FaultProxy,
    Flip,
    Latency,
    LostResponse,
    Request,
    Reset,
    Stall,
    Status,
    Truncate,
    each,
    matching,
    nth,
)

BODY = bytes(range(256)) * 1024  # 256 KiB: several pieces


class Upstream(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects: dict[str, bytes] = {}
        self.cut = threading.Event()  # a request has ended before its body
        self.requests: list[str] = []

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Upstream
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args: Any) -> None:
        pass

    def do_PUT(self) -> None:
        self.server.requests.append(f"PUT {self.path}")
        try:
            body = self.chunks() if "chunked" in self.headers.get("Transfer-Encoding", "") else self.exactly()
        except OSError:
            self.close_connection = True
            self.server.cut.set()
            return
        self.server.objects[self.path] = body
        self.answer(200, b"")

    def exactly(self) -> bytes:
        body = self.rfile.read(size := int(self.headers["Content-Length"]))
        if len(body) < size:
            raise ConnectionError
        return body

    def chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def do_GET(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        if self.path == "/chunked":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"3\r\none\r\n3;x=y\r\ntwo\r\n0\r\nTrailer: yes\r\n\r\n")
        elif self.path == "/until-the-end":
            self.send_response(200)
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(BODY)
        else:
            body = self.server.objects.get(self.path)
            self.answer(404, b"absent") if body is None else self.answer(200, body)

    do_HEAD = do_GET  # noqa: N815 - the server looks for this name

    def do_POST(self) -> None:
        """Says no before it has read the body."""
        self.answer(403, b"no", "Connection", "close")
        self.close_connection = True
        with contextlib.suppress(OSError):
            while self.rfile.read1(1 << 16):  # closing at once would take the answer back
                pass

    def answer(self, status: int, body: bytes, *header: str) -> None:
        self.send_response(status)
        if header:
            self.send_header(*header)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    with Upstream() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def proxy(upstream: Upstream) -> Iterator[FaultProxy]:
    with FaultProxy(upstream.uri) as proxy:
        yield proxy


@contextlib.contextmanager
def client_of(proxy: FaultProxy) -> Iterator[http.client.HTTPConnection]:
    client = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=60)
    try:
        yield client
    finally:
        client.close()


def send(proxy: FaultProxy, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    with client_of(proxy) as client:
        client.request(method, path, body=body)
        response = client.getresponse()
        return response.status, response.read()


def test_requests_pass_unchanged_and_on_one_connection(proxy: FaultProxy, upstream: Upstream) -> None:
    with client_of(proxy) as client:
        client.connect()
        connection = client.sock
        for method, path, body in (
            ("PUT", "/bucket/a%20b?x=1", BODY), ("GET", "/bucket/a%20b?x=1", None), ("HEAD", "/bucket/a%20b?x=1", None),
            ("GET", "/absent", None), ("PUT", "/empty", b""), ("GET", "/chunked", None), ("GET", "/empty", None),
        ):  # fmt: skip
            client.request(method, path, body=body, headers={"X-Odd": "Value"})
            response = client.getresponse()
            answer = response.read()
            if method == "GET":
                assert answer == {"/absent": b"absent", "/empty": b"", "/chunked": b"onetwo"}.get(path, BODY)
            assert client.sock is connection
    assert upstream.objects == {"/bucket/a%20b?x=1": BODY, "/empty": b""}
    first = proxy.requests[0]
    assert (first.number, first.method, first.path, first.query) == (1, "PUT", "/bucket/a%20b", "x=1")
    assert (first.size, first.headers["x-odd"], first.headers["host"]) == (
        len(BODY),
        "Value",
        f"127.0.0.1:{proxy.port}",
    )
    assert str(first) == "request 1, PUT /bucket/a%20b?x=1"
    assert [request.number for request in proxy.requests] == [1, 2, 3, 4, 5, 6, 7]
    assert proxy.faulted == []


def test_bodies_of_no_stated_length_pass(proxy: FaultProxy, upstream: Upstream) -> None:
    with client_of(proxy) as client:
        client.request("PUT", "/object", body=iter([b"one", BODY, b"two"]), encode_chunked=True)
        assert client.getresponse().read() == b""
    assert upstream.objects["/object"] == b"one" + BODY + b"two"
    assert proxy.requests[0].size is None
    assert send(proxy, "GET", "/until-the-end") == (200, BODY)


def test_a_client_that_asks_before_it_sends_gets_an_answer(proxy: FaultProxy, upstream: Upstream) -> None:
    head = f"PUT /object HTTP/1.1\r\nHost: x\r\nContent-Length: {len(BODY)}\r\nExpect: 100-continue\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", proxy.port)) as client:
        client.sendall(head)
        assert client.recv(1000).startswith(b"HTTP/1.1 100 ")
        client.sendall(BODY)
        assert client.recv(1000).startswith(b"HTTP/1.1 200 ")
        proxy.plan = nth(1, Status(403, "AccessDenied"))
        client.sendall(head)
        assert client.recv(1000).startswith(b"HTTP/1.1 403 ")
    assert upstream.objects == {"/object": BODY}


def test_a_client_that_asks_and_does_not_wait_is_heard_too(proxy: FaultProxy, upstream: Upstream) -> None:
    head = f"PUT /object HTTP/1.1\r\nHost: x\r\nContent-Length: {len(BODY)}\r\nExpect: 100-continue\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", proxy.port)) as client, client.makefile("rb") as answers:
        client.sendall(head + BODY)
        lines = [answers.readline()[:13] for _ in range(3)]
    assert lines == [b"HTTP/1.1 100 ", b"\r\n", b"HTTP/1.1 200 "]
    assert upstream.objects == {"/object": BODY}


def test_an_answer_that_comes_before_the_body_has_gone_is_passed_on(proxy: FaultProxy) -> None:
    with client_of(proxy) as client:
        client.putrequest("POST", "/object")
        client.putheader("Content-Length", str(100 << 20))
        client.endheaders()
        with contextlib.suppress(OSError):
            for _ in range(100):
                client.send(bytes(1 << 20))
        assert client.getresponse().status == 403


def test_latency_comes_before_the_server_hears_of_it(upstream: Upstream) -> None:
    arrived = threading.Event()

    def plan(request: Request) -> Fault:
        arrived.set()
        return Latency(1000)

    with FaultProxy(upstream.uri, plan=plan) as proxy, client_of(proxy) as client:
        client.request("GET", "/object")
        assert arrived.wait(60)
        assert upstream.requests == []
        proxy.close()  # it does not wait for that long


@pytest.mark.parametrize("after", [0, 1, 100_000, len(BODY), 10 * len(BODY)])
def test_a_reset_of_a_request_leaves_no_object(proxy: FaultProxy, upstream: Upstream, after: int) -> None:
    proxy.plan = nth(1, Reset(after))
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        send(proxy, "PUT", "/object", BODY)
    if after < len(BODY):
        assert upstream.cut.wait(60)
        assert upstream.objects == {}
    assert send(proxy, "PUT", "/object", BODY)[0] == 200
    assert [str(request) for request, _ in proxy.faulted] == ["request 1, PUT /object"]


def test_a_reset_of_a_response_comes_after_so_many_bytes(proxy: FaultProxy, upstream: Upstream) -> None:
    upstream.objects["/object"] = BODY
    proxy.plan = nth(1, Reset(1000, "response"))
    with client_of(proxy) as client:
        client.request("GET", "/object")
        with pytest.raises(ConnectionResetError) as caught:
            client.getresponse().read()
    assert caught.value.errno == errno.ECONNRESET
    assert send(proxy, "GET", "/object") == (200, BODY)


@pytest.mark.parametrize("method", ["PUT", "GET", "HEAD"])
def test_a_status_is_an_s3_error_of_which_the_server_hears_nothing(
    proxy: FaultProxy, upstream: Upstream, method: str
) -> None:
    proxy.plan = nth(1, Status(503, "SlowDown", (("Retry-After", "1"),)))
    with client_of(proxy) as client:
        client.request(method, "/object", body=BODY if method == "PUT" else None)
        response = client.getresponse()
        assert (response.status, response.reason, response.getheader("Retry-After")) == (503, "SlowDown", "1")
        assert (b"<Code>SlowDown</Code>" in response.read()) is (method != "HEAD")
        assert upstream.requests == []
        client.request("PUT", "/object", body=b"second")  # on the same connection
        assert client.getresponse().status == 200
    assert upstream.objects == {"/object": b"second"}


@pytest.mark.parametrize("at", [0, 1, 100_000])
def test_a_truncated_response_is_shorter_than_it_said(proxy: FaultProxy, upstream: Upstream, at: int) -> None:
    upstream.objects["/object"] = BODY
    proxy.plan = nth(1, Truncate(at))
    with pytest.raises(http.client.IncompleteRead) as caught:
        send(proxy, "GET", "/object")
    assert caught.value.partial == BODY[:at]
    assert send(proxy, "GET", "/object") == (200, BODY)


@pytest.mark.parametrize("offset", [0, 65_535, 65_536, len(BODY) - 1, len(BODY)])
def test_one_bit_is_flipped(proxy: FaultProxy, upstream: Upstream, offset: int) -> None:
    flipped = bytearray(BODY)
    if offset < len(BODY):
        flipped[offset] ^= 1
    proxy.plan = nth(1, Flip(offset))
    send(proxy, "PUT", "/object", BODY)
    assert upstream.objects["/object"] == flipped
    upstream.objects["/object"] = BODY
    proxy.plan = nth(1, Flip(offset, "response"))
    assert send(proxy, "GET", "/object") == (200, bytes(flipped))


def test_a_lost_response_is_of_a_request_that_was_done(proxy: FaultProxy, upstream: Upstream) -> None:
    proxy.plan = nth(1, LostResponse())
    with pytest.raises(http.client.RemoteDisconnected):
        send(proxy, "PUT", "/object", BODY)
    assert upstream.objects == {"/object": BODY}


def test_a_stalled_response_goes_no_further_until_the_proxy_closes(upstream: Upstream) -> None:
    upstream.objects["/object"] = BODY
    with FaultProxy(upstream.uri, plan=nth(1, Stall(1000, "response"))) as proxy, client_of(proxy) as client:
        client.request("GET", "/object")
        response = client.getresponse()
        assert response.read(1000) == BODY[:1000]
        assert client.sock is not None
        client.sock.settimeout(0.1)
        with pytest.raises(TimeoutError):
            response.read(1)
        client.sock.settimeout(60)
        proxy.close()
        assert client.sock.recv(1) == b""


def test_a_stalled_request_never_arrives(upstream: Upstream) -> None:
    with FaultProxy(upstream.uri, plan=nth(1, Stall(1000))) as proxy, client_of(proxy) as client:
        client.request("PUT", "/object", body=BODY)
        assert client.sock is not None
        client.sock.settimeout(0.1)
        with pytest.raises(TimeoutError):
            client.getresponse()
    assert upstream.cut.wait(60)
    assert upstream.objects == {}


@pytest.mark.parametrize(
    ("when", "heard", "done"), [("before", False, False), ("half", None, False), ("after", True, True)]
)
def test_a_call_comes_at_its_point_of_the_request(
    proxy: FaultProxy, upstream: Upstream, when: Any, heard: bool | None, done: bool
) -> None:
    seen: list[tuple[Request, bool, bool]] = []
    proxy.plan = nth(1, Call(lambda r: seen.append((r, bool(upstream.requests), bool(upstream.objects))), when))
    assert send(proxy, "PUT", "/object", BODY)[0] == 200
    ((request, was_heard, was_done),) = seen
    assert request is proxy.requests[0]
    assert heard in (None, was_heard)
    assert was_done is done
    assert upstream.objects == {"/object": BODY}


@pytest.mark.parametrize("when", ["before", "half", "after"])
@pytest.mark.parametrize("method", ["PUT", "GET"])
def test_the_client_can_be_killed_inside_a_request(
    proxy: FaultProxy, upstream: Upstream, when: Any, method: str
) -> None:
    code = f"""if True:
        import http.client
        client = http.client.HTTPConnection("127.0.0.1", {proxy.port})
        client.request({method!r}, "/object", body={"bytes(50_000_000)" if method == "PUT" else None})
        client.getresponse()
        """
    with subprocess.Popen([sys.executable, "-S", "-c", code]) as process:

        def kill(request: Request) -> None:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()

        proxy.plan = nth(1, Call(kill, when))
        assert process.wait(60) == -signal.SIGKILL
    proxy.close()
    if method == "PUT":
        assert bool(upstream.objects) is (when == "after")


def test_what_a_plan_raises_is_raised_by_the_end_of_the_context(upstream: Upstream) -> None:
    def plan(request: Request) -> Fault | None:
        raise ZeroDivisionError(str(request))

    with pytest.raises(ZeroDivisionError, match="request 1, GET /object"):  # noqa: SIM117
        with FaultProxy(upstream.uri, plan=plan) as proxy:
            with pytest.raises(OSError):
                send(proxy, "GET", "/object")


def test_a_server_that_is_not_there_is_a_connection_that_ends() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with FaultProxy(f"http://127.0.0.1:{port}") as proxy, pytest.raises(OSError):
        send(proxy, "GET", "/object")


@pytest.mark.parametrize("uri", ["https://127.0.0.1:1", "127.0.0.1:1", "http://", "http://host/path"])
def test_an_address_that_is_none_is_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match="write an address"):
        FaultProxy(uri)


def test_a_limited_bandwidth_sends_all_the_same(upstream: Upstream) -> None:
    with FaultProxy(upstream.uri, bandwidth=4 << 20) as proxy:
        assert send(proxy, "PUT", "/object", BODY)[0] == 200
        assert send(proxy, "GET", "/object") == (200, BODY)


def test_closing_ends_what_is_idle_and_may_be_repeated(upstream: Upstream) -> None:
    proxy = FaultProxy(upstream.uri)
    with client_of(proxy) as client:
        client.request("GET", "/object")
        client.getresponse().read()
        proxy.close()
        proxy.close()
        assert client.sock is not None
        assert client.sock.recv(1) == b""


# -- plans -------------------------------------------------------------------------------------------------------------------------


def request(number: int = 1, method: str = "PUT", path: str = "/bucket/key", query: str = "") -> Request:
    return Request(number, method, path, query, {}, 0)


def test_nth_counts_what_it_sees() -> None:
    plan = nth(2, LostResponse())
    assert [plan(request(number)) for number in (7, 8, 9)] == [None, LostResponse(), None]


def test_matching_hits_what_fits_and_so_often() -> None:
    plan = matching(Latency(1), method="PUT", path_contains="/manifests/", query_contains="partNumber", skip=1, times=2)
    fits = request(path="/b/manifests/1", query="partNumber=3")
    others = [request(path="/b/manifests/1"), request(query="partNumber=3"), request(method="GET")]
    assert [plan(other) for other in others] == [None, None, None]
    assert [plan(fits) for _ in range(5)] == [None, Latency(1), Latency(1), None, None]
    always = matching(Latency(1))
    assert {always(other) for other in [fits, *others]} == {Latency(1)}


def test_each_gives_the_same_faults_for_the_same_seed() -> None:
    faults: list[Fault] = [Reset(), LostResponse()]
    first, second = ([plan(request(number)) for number in range(200)] for plan in (each(0.5, faults, 1) for _ in "12"))
    assert first == second
    assert set(first) == {None, *faults}
    assert {each(0, faults)(request()), each(1, faults[:1])(request())} == {None, Reset()}


# -- a real server -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["seaweedfs", "moto"])
def test_signatures_stay_valid(name: str, request: pytest.FixtureRequest) -> None:
    server: S3Server = request.getfixturevalue(name)
    with FaultProxy(server.endpoint) as proxy:
        client = server.behind(proxy.uri).client()
        key = f"test_proxy/{name}"
        client.put_object(Bucket=server.plain, Key=key, Body=BODY)
        assert client.get_object(Bucket=server.plain, Key=key)["Body"].read() == BODY
        client.close()
    assert [seen.method for seen in proxy.requests] == ["PUT", "GET"]


def test_a_bit_flipped_on_the_way_is_noticed_by_a_server_that_checks(seaweedfs: S3Server) -> None:
    with FaultProxy(seaweedfs.endpoint, plan=nth(1, Flip(1000))) as proxy:
        client = seaweedfs.behind(proxy.uri).client(retries={"total_max_attempts": 1})
        with pytest.raises(Exception, match=r"BadDigest|SHA256|checksum"):
            client.put_object(Bucket=seaweedfs.plain, Key="test_proxy/flipped", Body=BODY)
        client.close()
