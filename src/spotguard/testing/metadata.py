"""Metadata services of the clouds, faithful down to their refusals, on loopback: for tests of what hears notices.

What each of them accepts, refuses and answers is what its documentation says; times can be scaled down.
"""

import datetime as dt
import email.utils
import json
import secrets
import threading
import time
import urllib.parse
from collections import deque
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

__all__ = ["FakeAws", "FakeAzure", "FakeGoogle", "Reply", "Request"]


class Request(NamedTuple):
    """What was asked."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: Mapping[str, str]
    body: bytes


class Reply(NamedTuple):
    """What is answered."""

    status: int
    text: str = ""
    headers: Mapping[str, str] = {}


class _Fake:
    """A server on loopback, in a thread of its own."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._failing: deque[Reply] = deque()
        self._closed = False
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                parts = urllib.parse.urlsplit(self.path)
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                headers = {name.lower(): value for name, value in self.headers.items()}
                query = urllib.parse.parse_qs(parts.query)
                reply = fake._reply(Request(self.command, parts.path, query, headers, body))
                data = reply.text.encode()
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_PUT = do_POST = do_HEAD = answer  # noqa: N815 - names that http.server wants

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None:
                """A client that has hung up is not our trouble."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    @property
    def address(self) -> str:
        """Host and port."""
        return f"127.0.0.1:{self._server.server_address[1]}"

    @property
    def endpoint(self) -> str:
        """Base of its URLs."""
        return f"http://{self.address}"

    def fail_next(self, status: int, times: int = 1, text: str = "", headers: Mapping[str, str] | None = None) -> None:
        """Answer the next requests with this, whatever they ask for."""
        with self._lock:
            self._failing.extend(Reply(status, text, headers or {}) for _ in range(times))

    def wait_for(self, count: int, path: str = "", timeout: float = 10.0) -> None:
        """Wait until so many requests, whose path has that in it, have come in all.

        Raises:
            TimeoutError: They have not.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: sum(path in one.path for one in self.requests) >= count, timeout):
                raise TimeoutError(f"{count} requests for {path!r} did not come within {timeout:g} s")

    def __enter__(self) -> "Self":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: "TracebackType | None"
    ) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _reply(self, request: Request) -> Reply:
        with self._changed:
            self.requests.append(request)
            self._changed.notify_all()
            if self._failing:
                return self._failing.popleft()
        return self.answer(request)

    def answer(self, request: Request) -> Reply:
        """What this service answers."""
        raise NotImplementedError


class FakeAws(_Fake):
    """The instance metadata service of EC2.

    Args:
        v2_only: Refuse requests without a token.
        hop_limit_hang: Do not answer requests for a token: what a container sees whose hop limit is 1.
        off: Refuse everything.

    Example:
        >>> from spotguard.notices import AwsSource
        >>> with FakeAws() as aws:
        ...     aws.interrupt("terminate", in_s=120)
        ...     AwsSource(aws.endpoint).get("spot/instance-action").text[:22]
        '{"action": "terminate"'
    """

    def __init__(self, *, v2_only: bool = True, hop_limit_hang: bool = False, off: bool = False) -> None:
        super().__init__()
        self.v2_only, self.hop_limit_hang, self.off = v2_only, hop_limit_hang, off
        self.items: dict[str, str] = {
            "instance-life-cycle": "spot",
            "instance-type": "g5.xlarge",
            "placement/availability-zone": "us-east-1a",
            "autoscaling/target-lifecycle-state": "InService",
            "events/maintenance/scheduled": "[]",
        }
        self.lifetime_s: int | None = None
        self._tokens: dict[str, float] = {}

    @property
    def environment(self) -> dict[str, str]:
        """Variables that lead here."""
        return {"AWS_EC2_METADATA_SERVICE_ENDPOINT": self.endpoint, "AWS_EC2_METADATA_DISABLED": "false"}

    def interrupt(self, action: str = "terminate", in_s: float = 120.0) -> None:
        """Announce that the instance is interrupted."""
        self.items["spot/instance-action"] = json.dumps({"action": action, "time": _iso(in_s)})

    def rebalance(self) -> None:
        """Recommend to go elsewhere."""
        self.items["events/recommendations/rebalance"] = json.dumps({"noticeTime": _iso(0)})

    def maintain(self, code: str = "system-reboot", in_s: float = 3600.0, state: str = "active") -> None:
        """Plan maintenance."""
        begin = dt.datetime.now(dt.timezone.utc) + dt.timedelta(seconds=in_s)
        event = {
            "NotBefore": begin.strftime("%d %b %Y %H:%M:%S GMT"),
            "Code": code,
            "Description": code,
            "EventId": "instance-event-0d59937288b749b32",
            "State": state,
        }
        self.items["events/maintenance/scheduled"] = json.dumps([event])

    def clear(self) -> None:
        """Nothing is planned."""
        for name in ("spot/instance-action", "events/recommendations/rebalance"):
            self.items.pop(name, None)
        self.items |= {"events/maintenance/scheduled": "[]", "autoscaling/target-lifecycle-state": "InService"}

    def retire_tokens(self) -> None:
        """Let every token expire."""
        self._tokens.clear()

    def answer(self, request: Request) -> Reply:
        """See `_Fake`."""
        if self.off:
            return Reply(403)
        if request.method == "PUT":
            return self._give_token(request)
        token = request.headers.get("x-aws-ec2-metadata-token")
        if self._tokens.get(token or "", 0) < time.monotonic() and (token is not None or self.v2_only):
            return Reply(401)
        found = self.items.get(request.path.removeprefix("/latest/meta-data/"))
        return Reply(404) if found is None else Reply(200, found, {"Content-Type": "text/plain"})

    def _give_token(self, request: Request) -> Reply:
        if self.hop_limit_hang:
            with self._changed:
                self._changed.wait_for(lambda: self._closed)
        if request.path != "/latest/api/token" or "x-forwarded-for" in request.headers:
            return Reply(403)
        wanted = request.headers.get("x-aws-ec2-metadata-token-ttl-seconds", "")
        if not wanted.isdecimal() or not 1 <= int(wanted) <= 21600:
            return Reply(400)
        token, seconds = secrets.token_urlsafe(16), self.lifetime_s or int(wanted)
        self._tokens[token] = time.monotonic() + seconds
        return Reply(200, token, {"X-aws-ec2-metadata-token-ttl-seconds": str(seconds)})


class FakeGoogle(_Fake):
    """The metadata server of Compute Engine.

    Args:
        second_s: How long a second of ``timeout_sec`` is.

    Example:
        >>> from spotguard.notices import GoogleSource
        >>> with FakeGoogle() as google:
        ...     google.preempt()
        ...     GoogleSource(google.address).get("instance/preempted").text
        'TRUE'
    """

    def __init__(self, *, second_s: float = 1.0) -> None:
        super().__init__()
        self._second_s = second_s
        self.items = {
            "preempted": "FALSE",
            "maintenance-event": "NONE",
            "zone": "projects/123456/zones/europe-west1-b",
            "machine-type": "projects/123456/machineTypes/n2-standard-4",
        }

    @property
    def environment(self) -> dict[str, str]:
        """Variables that lead here."""
        return {"GCE_METADATA_HOST": self.address}

    def preempt(self) -> None:
        """Announce that the VM is preempted."""
        self.put("preempted", "TRUE")

    def maintain(self, value: str = "TERMINATE_ON_HOST_MAINTENANCE") -> None:
        """Announce maintenance, or that there is ``NONE``."""
        self.put("maintenance-event", value)

    def clear(self) -> None:
        """Nothing is planned."""
        self.put("preempted", "FALSE")
        self.put("maintenance-event", "NONE")

    def put(self, name: str, value: str | None) -> None:
        """Set a value; None takes it away."""
        with self._changed:
            self.items.pop(name, None)
            if value is not None:
                self.items[name] = value
            self._changed.notify_all()

    def answer(self, request: Request) -> Reply:
        """See `_Fake`."""
        if request.headers.get("metadata-flavor") != "Google" or "x-forwarded-for" in request.headers:
            return Reply(403)
        name, query = request.path.removeprefix("/computeMetadata/v1/instance/"), request.query
        with self._changed:
            if name not in self.items:
                return Reply(404, headers={"Metadata-Flavor": "Google"})
            if query.get("wait_for_change") == ["true"]:
                seen = query.get("last_etag", [_etag(self.items[name])])[0]
                limit = query.get("timeout_sec")
                self._changed.wait_for(
                    lambda: self._closed or name not in self.items or _etag(self.items[name]) != seen,
                    None if limit is None else float(limit[0]) * self._second_s,
                )
            value = self.items.get(name)
        if value is None:
            return Reply(404, headers={"Metadata-Flavor": "Google"})
        return Reply(200, value + "\n", {"Metadata-Flavor": "Google", "ETag": _etag(value)})


class FakeAzure(_Fake):
    """Scheduled Events of Azure.

    Args:
        name: Of the VM.
        first_s: How long the first request takes, which switches the service on.
        limit: Requests that are answered in a second.

    Example:
        >>> with FakeAzure() as azure:
        ...     event = azure.schedule("Preempt", in_s=30)
        ...     azure.withdraw(event)
        ...     azure.incarnation
        2
    """

    def __init__(self, *, name: str = "myspotvm", first_s: float = 0.0, limit: int = 5) -> None:
        super().__init__()
        self.name, self.first_s, self.limit = name, first_s, limit
        self.incarnation = 0
        self.events: dict[str, dict[str, Any]] = {}
        self.approved: list[str] = []
        self._asked: deque[float] = deque()
        self._on = False

    @property
    def environment(self) -> dict[str, str]:
        """Variables that lead here."""
        return {"SPOTGUARD_AZURE_ENDPOINT": self.endpoint}

    def schedule(
        self,
        event_type: str = "Preempt",
        in_s: float = 30.0,
        *,
        resources: tuple[str, ...] = (),
        text: str | None = None,
    ) -> str:
        """Announce an event, for this VM if no other is named; `text` is what stands as its time. Returns its id."""
        event_id = f"{secrets.token_hex(4)}-0000-0000-0000-000000000000".upper()
        begin = dt.datetime.now(dt.timezone.utc) + dt.timedelta(seconds=in_s)
        with self._lock:
            self.incarnation += 1
            self.events[event_id] = {
                "EventId": event_id,
                "EventStatus": "Scheduled",
                "EventType": event_type,
                "ResourceType": "VirtualMachine",
                "Resources": list(resources or (self.name,)),
                "NotBefore": email.utils.format_datetime(begin, usegmt=True) if text is None else text,
                "Description": "",
                "EventSource": "Platform",
            }
        return event_id

    def withdraw(self, event_id: str) -> None:
        """The event disappears: it was cancelled, or is over."""
        with self._lock:
            self.incarnation += 1
            del self.events[event_id]

    def start(self, event_id: str) -> None:
        """The event begins."""
        with self._lock:
            self.incarnation += 1
            self.events[event_id] |= {"EventStatus": "Started", "NotBefore": ""}

    def clear(self) -> None:
        """Nothing is planned."""
        with self._lock:
            self.incarnation += 1
            self.events.clear()

    def answer(self, request: Request) -> Reply:
        """See `_Fake`."""
        if request.headers.get("metadata") != "true" or "x-forwarded-for" in request.headers:
            return Reply(400)
        if any(len(values) > 1 for values in request.query.values()) or "api-version" not in request.query:
            return Reply(400)
        with self._lock:
            now = time.monotonic()
            while self._asked and self._asked[0] < now - 1:
                self._asked.popleft()
            if len(self._asked) >= self.limit:
                return Reply(429)
            self._asked.append(now)
        if request.path == "/metadata/instance/compute/name":
            return Reply(200, self.name)
        if request.path != "/metadata/scheduledevents":
            return Reply(404)
        if request.method == "POST":
            return self._approve(request.body)
        with self._changed:
            if not self._on:
                self._changed.wait_for(lambda: self._closed, self.first_s)
                self._on = True
            document = {"DocumentIncarnation": self.incarnation, "Events": list(self.events.values())}
        return Reply(200, json.dumps(document), {"Content-Type": "application/json"})

    def _approve(self, body: bytes) -> Reply:
        try:
            wanted = [str(one["EventId"]) for one in json.loads(body)["StartRequests"]]
        except (ValueError, KeyError, TypeError):
            return Reply(400)
        self.approved += wanted
        return Reply(200)


def _iso(in_s: float) -> str:
    instant = dt.datetime.now(dt.timezone.utc) + dt.timedelta(seconds=in_s)
    return instant.isoformat(timespec="seconds").replace("+00:00", "Z")


def _etag(value: str) -> str:
    return f"{abs(hash(value)):016x}"
