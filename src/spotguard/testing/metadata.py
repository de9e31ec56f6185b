"""Metadata services of the clouds, faithful down to their refusals, on loopback: for tests of what hears notices.

What each of them accepts, refuses and answers is what its documentation says; times can be scaled down.
"""

import datetime as dt
import email.utils
import json
import secrets
import time
from collections import deque
from typing import Any

from spotguard.testing._service import Exchange, Reply, Request, Service

__all__ = ["Exchange", "FakeAws", "FakeAzure", "FakeGoogle", "Reply", "Request"]

_GOOGLE = {"Metadata-Flavor": "Google"}


class FakeAws(Service):
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
            "placement/region": "us-east-1",
            "autoscaling/target-lifecycle-state": "InService",
            "events/maintenance/scheduled": "[]",
            "events/maintenance/history": "[]",
        }
        self.lifetime_s: int | None = None
        self._tokens: dict[str, float] = {}

    @property
    def environment(self) -> dict[str, str]:
        """Variables that lead here."""
        return {"AWS_EC2_METADATA_SERVICE_ENDPOINT": self.endpoint, "AWS_EC2_METADATA_DISABLED": "false"}

    def interrupt(self, action: str = "terminate", in_s: float = 120.0) -> None:
        """Announce that the instance is interrupted.

        The older item, ``spot/termination-time``, says the same; EC2 may have something there that is no time. Write that to `items`.
        """
        instant = _iso(in_s)
        self.items["spot/instance-action"] = json.dumps({"action": action, "time": instant})
        self.items["spot/termination-time"] = instant

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
        for name in ("spot/instance-action", "spot/termination-time", "events/recommendations/rebalance"):
            self.items.pop(name, None)
        self.items |= {"events/maintenance/scheduled": "[]", "autoscaling/target-lifecycle-state": "InService"}

    def retire_tokens(self) -> None:
        """Let every token expire."""
        self._tokens.clear()

    def answer(self, request: Request) -> Reply:
        """See `Service`."""
        if self.off:
            return Reply(403)
        if request.method == "PUT":
            return self._give_token(request)
        if request.method not in ("GET", "HEAD"):
            return Reply(405)
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


class FakeGoogle(Service):
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
            "scheduling/preemptible": "TRUE",
            "scheduling/provisioning-model": "SPOT",
            "scheduling/on-host-maintenance": "TERMINATE",
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
        """See `Service`."""
        if request.headers.get("metadata-flavor") != "Google" or "x-forwarded-for" in request.headers:
            return Reply(403)
        name, query = request.path.removeprefix("/computeMetadata/v1/instance/"), request.query
        waits, recursive = (query.get(key) == ["true"] for key in ("wait_for_change", "recursive"))
        with self._changed:
            if waits and not recursive and name not in self.items and self._value(name) is not None:
                return Reply(400, headers=_GOOGLE)  # a directory
            value = self._value(name, recursive)
            if waits and value is not None:
                seen, limit = query.get("last_etag", [_etag(value)])[0], query.get("timeout_sec")
                self._changed.wait_for(
                    lambda: self._closed or _etag(self._value(name, recursive)) != seen,
                    None if limit is None else float(limit[0]) * self._second_s,
                )
                value = self._value(name, recursive)
        if value is None:
            return Reply(404, headers=_GOOGLE)
        return Reply(200, value + "\n", {**_GOOGLE, "ETag": _etag(value)})

    def _value(self, name: str, recursive: bool = False) -> str | None:  # noqa: FBT001, FBT002 - as in the query
        """Of a key; of a directory the names in it, or everything as JSON."""
        if name in self.items:
            return self.items[name]
        folder = f"{name.rstrip('/')}/".lstrip("/")
        below = {key.removeprefix(folder): value for key, value in self.items.items() if key.startswith(folder)}
        if not below:
            return None
        if not recursive:
            return "\n".join(sorted({key if "/" not in key else key[: key.index("/") + 1] for key in below}))
        tree: dict[str, Any] = {}
        for key, value in below.items():
            *folders, last = [_camel(part) for part in key.split("/")]
            branch = tree
            for part in folders:
                branch = branch.setdefault(part, {})
            branch[last] = value
        return json.dumps(tree)


class FakeAzure(Service):
    """Scheduled Events of Azure.

    Args:
        name: Of the VM.
        first_s: How long the first request takes, which switches the service on.
        limit: Requests that are answered in a second.

    Attributes:
        compute: What the instance metadata says of the VM.
        approved: Events that were asked to begin at once, in the order of the requests.

    Example:
        >>> from spotguard.notices import AzureSource
        >>> with FakeAzure() as azure:
        ...     event = azure.schedule("Preempt", in_s=30)
        ...     text = AzureSource(azure.endpoint).get("/metadata/scheduledevents?api-version=2020-07-01").text
        >>> json.loads(text)["Events"][0]["EventType"]
        'Preempt'
    """

    def __init__(self, *, name: str = "myspotvm", first_s: float = 0.0, limit: int = 5) -> None:
        super().__init__()
        self.first_s, self.limit = first_s, limit
        self.incarnation = 0
        self.compute = {
            "name": name,
            "vmSize": "Standard_NC4as_T4_v3",
            "location": "westeurope",
            "zone": "1",
            "priority": "Spot",
            "evictionPolicy": "Deallocate",
            "vmId": "02aab8a4-74ef-476e-8182-f6d2ba4166a6",
            "resourceGroupName": "training",
            "vmScaleSetName": "",
        }
        self.events: dict[str, dict[str, Any]] = {}
        self.approved: list[str] = []
        self._asked: deque[float] = deque()
        self._on = False

    @property
    def name(self) -> str:
        """Of the VM, as it stands in `compute`."""
        return str(self.compute["name"])

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
                "DurationInSeconds": 5 if event_type == "Freeze" else -1,
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
        """See `Service`."""
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
        if request.path.startswith("/metadata/instance/compute"):
            return self._describe(request)
        if request.path != "/metadata/scheduledevents":
            return Reply(404)
        if request.method == "POST":
            return self._approve(request.body)
        if request.method != "GET":
            return Reply(405)
        with self._changed:
            if not self._on:
                self._changed.wait_for(lambda: self._closed, self.first_s)
                self._on = True
            document = {"DocumentIncarnation": self.incarnation, "Events": list(self.events.values())}
        return Reply(200, json.dumps(document), {"Content-Type": "application/json"})

    def _describe(self, request: Request) -> Reply:
        if request.method != "GET":
            return Reply(405)
        name = request.path.removeprefix("/metadata/instance/compute").strip("/")
        if not name:
            return Reply(200, json.dumps(self.compute), {"Content-Type": "application/json"})
        if name not in self.compute:
            return Reply(404)
        return Reply(200, self.compute[name]) if request.query.get("format") == ["text"] else Reply(400)

    def _approve(self, body: bytes) -> Reply:
        """It begins at once; one that has begun already may be approved again."""
        try:
            wanted = [str(one["EventId"]) for one in json.loads(body)["StartRequests"]]
        except (ValueError, KeyError, TypeError):
            return Reply(400)
        with self._lock:
            if not wanted or any(event_id not in self.events for event_id in wanted):
                return Reply(400)
            for event_id in wanted:
                if self.events[event_id]["EventStatus"] == "Scheduled":
                    self.start(event_id)
            self.approved += wanted
        return Reply(200)


def _iso(in_s: float) -> str:
    instant = dt.datetime.now(dt.timezone.utc) + dt.timedelta(seconds=in_s)
    return instant.isoformat(timespec="seconds").replace("+00:00", "Z")


def _etag(value: str | None) -> str:
    return f"{abs(hash(value)):016x}"


def _camel(name: str) -> str:
    """As names are written in JSON: ``maintenanceEvent``."""
    first, *others = name.split("-")
    return first + "".join(other.capitalize() for other in others)
