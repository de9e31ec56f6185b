"""EC2: the notice is a line in the instance metadata, about two minutes ahead. No signal comes with it.

Endpoints, codes and intervals are those of the EC2 user guide ("Spot Instance interruption notices", "Use IMDSv2") and of botocore, whose
environment variables are honoured.
"""

import datetime as dt
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping

from spotguard.notices.base import PreemptionNotice
from spotguard.notices.metadata import Answer, MetadataClient, Poller, deadline_at, parse_json, parse_time

__all__ = ["AwsSource"]

logger = logging.getLogger(__name__)

_TTL_S, _RENEW_S = 21600, 60.0  # of a session token; it is renewed when less than this is left
_OFF_S = 300.0  # between two looks whether the service has been switched on again
_SELDOM = 6  # what has minutes of lead is asked every so many rounds
_LEAD_S = 120.0
_TOKEN, _DATA = "/latest/api/token", "/latest/meta-data/"
_HOP_HINT = (
    "the instance metadata service refuses requests without a token, and the token does not reach this process: in a container the hop "
    "limit has to be 2. Run: aws ec2 modify-instance-metadata-options --instance-id ID "
    "--http-put-response-hop-limit 2 --http-endpoint enabled"
)


class _OffError(Exception):
    """The service is switched off."""


class AwsSource:
    """Polls the metadata service of an EC2 instance.

    Args:
        endpoint: Its base; by default ``AWS_EC2_METADATA_SERVICE_ENDPOINT``, else the address that EC2 has.
        interval: Seconds between two questions; AWS recommends 5.

    Example:
        >>> AwsSource("http://127.0.0.1:1338").name
        'aws'
    """

    name = "aws"

    def __init__(self, endpoint: str | None = None, interval: float = 5.0) -> None:
        env = os.environ
        ipv6 = env.get("AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE", "").lower() == "ipv6"
        usual = "http://[fd00:ec2::254]" if ipv6 else "http://169.254.169.254"
        self._client = MetadataClient(endpoint or env.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or usual)
        self._disabled = endpoint is None and env.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true"
        self._tokenless = env.get("AWS_EC2_METADATA_V1_DISABLED", "").lower() != "true"
        self._poller = Poller(self.name, interval)
        self._token: str | None = None
        self._expires = 0.0
        self._round = 0
        self._warned: set[str] = set()
        self._standing: dict[str, PreemptionNotice] = {}

    def watch(self, emit: Callable[[PreemptionNotice], None], stop: threading.Event) -> None:
        """See `NoticeSource.watch`."""
        if not self._disabled:
            self._poller.run(lambda: self._ask(emit), stop)

    def wake(self) -> None:
        """See `Wakeable`."""
        self._client.interrupt()

    def get(self, path: str) -> Answer:
        """One item of the metadata, such as ``instance-life-cycle``, with a token, or without one where only that works.

        Raises:
            OSError: No answer.
        """
        if time.monotonic() > self._expires - _RENEW_S:
            self._renew()
        answer = self._send(path)
        if (
            answer.status == 401 and self._token is not None
        ):  # expired before its time: the instance was stopped in between
            self._renew()
            answer = self._send(path)
        if answer.status == 401:
            self._expires = 0.0
            self._warn_once(_HOP_HINT)
            raise PermissionError("the metadata service wants a token, and gives none")
        return answer

    def _send(self, path: str) -> Answer:
        return self._client.get(_DATA + path, {"X-aws-ec2-metadata-token": self._token} if self._token else {})

    def _renew(self) -> None:
        self._token = None
        trouble = ""
        try:
            answer = self._client.ask("PUT", _TOKEN, {"X-aws-ec2-metadata-token-ttl-seconds": str(_TTL_S)})
            if answer.status == 200 and answer.text:
                self._token, self._expires = answer.text, time.monotonic() + _lifetime(answer.headers)
                return
            trouble = f"status {answer.status}"
            if answer.status not in (403, 404, 405):
                raise ConnectionError(f"no token: {trouble}")
        except TimeoutError as error:  # the answer does not come through the hops of a container network
            trouble = str(error)
        if not self._tokenless:
            self._warn_once(_HOP_HINT)
            raise ConnectionError(f"no token, and AWS_EC2_METADATA_V1_DISABLED is set: {trouble}")
        self._expires = time.monotonic() + _OFF_S  # without a token for that long, then another try

    def _ask(self, emit: Callable[[PreemptionNotice], None]) -> float | None:
        try:
            self._look("spot/instance-action", _action, emit)
            self._look("events/recommendations/rebalance", _rebalance, emit)
            if self._round % _SELDOM == 0:
                self._look("autoscaling/target-lifecycle-state", _lifecycle, emit)
                self._look("events/maintenance/scheduled", _maintenance, emit)
            self._round += 1
        except _OffError:
            self._warn_once("the instance metadata service is switched off (403); notices of EC2 are not heard")
            self._expires = 0.0
            return max(_OFF_S, self._poller.interval)
        if any(notice.kind == "rebalance" for notice in self._standing.values()):
            return min(2.0, self._poller.interval)
        return None

    def _look(
        self,
        path: str,
        parse: Callable[[str], dict[str, PreemptionNotice]],
        emit: Callable[[PreemptionNotice], None],
    ) -> None:
        answer = self.get(path)
        if answer.status == 403:
            raise _OffError
        if answer.status == 404:
            found = {}
        elif answer.status == 200:
            found = parse(answer.text)
        else:
            raise ConnectionError(f"{path}: status {answer.status}")
        for notice_id, notice in found.items():
            if notice_id not in self._standing:
                self._standing[notice_id] = notice
                emit(notice)
        for gone in [one for one in self._standing if one.startswith(f"{path} ") and one not in found]:
            emit(self._standing.pop(gone).withdrawn())

    def _warn_once(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            logger.warning("%s: %s", self.name, text)


def _lifetime(headers: Mapping[str, str]) -> float:
    try:
        return float(headers.get("x-aws-ec2-metadata-token-ttl-seconds", _TTL_S))
    except ValueError:
        return float(_TTL_S)


def _notice(notice_id: str, detail: str, **fields: object) -> PreemptionNotice:
    given = {"source": AwsSource.name, "id": notice_id, "detail": f"EC2: {detail}", **fields}
    return PreemptionNotice(**given)  # type: ignore[arg-type]


def _action(text: str) -> dict[str, PreemptionNotice]:
    fields = parse_json(text) or {}
    action, instant = str(fields.get("action") or "interruption"), parse_time(fields.get("time"))
    notice_id = f"spot/instance-action {text}"
    if action == "hibernate":  # freezing begins with the notice
        return {notice_id: _notice(notice_id, "hibernates now", kind="preemption", deadline=time.monotonic())}
    deadline = time.monotonic() + _LEAD_S if instant is None else deadline_at(instant)
    when = f" at {instant:%H:%M:%S} UTC" if instant is not None else ", time unknown"
    return {notice_id: _notice(notice_id, f"spot {action}{when}", kind="preemption", deadline=deadline)}


def _rebalance(text: str) -> dict[str, PreemptionNotice]:
    notice_id = f"events/recommendations/rebalance {text}"
    return {notice_id: _notice(notice_id, "rebalance recommendation", kind="rebalance", action="save")}


def _lifecycle(text: str) -> dict[str, PreemptionNotice]:
    if text != "Terminated":
        return {}
    notice_id = f"autoscaling/target-lifecycle-state {text}"
    return {notice_id: _notice(notice_id, "Auto Scaling terminates this instance", kind="preemption")}


def _maintenance(text: str) -> dict[str, PreemptionNotice]:
    found: dict[str, PreemptionNotice] = {}
    for event in parse_json(text, list) or []:
        if not isinstance(event, dict) or event.get("State") != "active":
            continue
        code, begin = str(event.get("Code")), str(event.get("NotBefore"))
        notice_id = f"events/maintenance/scheduled {event.get('EventId')} {begin}"
        try:
            instant = dt.datetime.strptime(begin, "%d %b %Y %H:%M:%S GMT").replace(tzinfo=dt.timezone.utc)
        except ValueError:
            instant = None
        found[notice_id] = _notice(
            notice_id,
            f"{code} not before {begin}",
            kind="maintenance",
            action="save",
            deadline=None if instant is None else deadline_at(instant),
        )
    return found
