"""EC2: interruptions, rebalance advice, maintenance and the end by Auto Scaling, from the instance metadata service (IMDS).

Nothing inside the machine is signalled when the notice comes: it exists as metadata alone, about 120 s before the end, best effort.
https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html
"""

import json
import logging
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any

from spotguard.errors import ConfigError
from spotguard.notices.base import PreemptionNotice
from spotguard.notices.metadata import (
    Answer,
    Clock,
    Health,
    MetadataClient,
    Told,
    http_time,
    iso_time,
    json_object,
    poll,
    unexpected,
)

__all__ = ["AwsSource"]

logger = logging.getLogger(__name__)

_TOKEN = "/latest/api/token"  # noqa: S105 - a path; with a date in place of "latest" it answers 403
_TTL = "X-aws-ec2-metadata-token-ttl-seconds"
_TTL_S = 21600  # the longest there is
_SPARE_S = 60.0  # a token with less to live is not used any more
_ACTION = "/latest/meta-data/spot/instance-action"
_REBALANCE = "/latest/meta-data/events/recommendations/rebalance"
_MAINTENANCE = "/latest/meta-data/events/maintenance/scheduled"
_LIFECYCLE = "/latest/meta-data/autoscaling/target-lifecycle-state"
_LEAD_S = 120.0  # from the notice to the end, where the notice says no time
_AT_RISK_S = 2.0  # after rebalance advice; every 5 s is what AWS recommends otherwise
_OFF_S = 300.0
_V1_S = 300.0  # until the token is asked for again, where it was not to be had
_SLOW_ROUNDS = 6  # maintenance is announced days ahead


class AwsSource:
    """Notices of an EC2 instance.

    It reads the variables that botocore reads: ``AWS_EC2_METADATA_DISABLED``, ``AWS_EC2_METADATA_SERVICE_ENDPOINT``,
    ``AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE``, ``AWS_EC2_METADATA_V1_DISABLED``, ``AWS_METADATA_SERVICE_TIMEOUT``. The number of attempts is
    of no use here: it asks until it is stopped.

    An interruption stands even when IMDS does not show it any more: AWS documents no way in which one is taken back.

    Args:
        endpoint: Of the service; by default what the environment says, else ``http://169.254.169.254``.
        interval: Seconds between two questions.
        clock: For tests.

    Raises:
        ConfigError: The endpoint is no address, or the timeout no number.

    Example:
        >>> from spotguard.testing.metadata import FakeAws
        >>> with FakeAws() as imds:
        ...     when = imds.interrupt("terminate", in_s=120)
        ...     stop, heard = threading.Event(), []
        ...     AwsSource(imds.endpoint).watch(lambda notice: (heard.append(notice), stop.set()), stop)
        >>> heard[0].kind, heard[0].action, heard[0].id == f"terminate {when}"
        ('preemption', 'stop', True)
    """

    name = "aws"

    def __init__(self, endpoint: str | None = None, interval: float = 5.0, *, clock: Clock | None = None) -> None:
        env, argument = os.environ, "endpoint"
        if endpoint is None:
            argument = "AWS_EC2_METADATA_SERVICE_ENDPOINT"
            ipv6 = env.get("AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE", "").lower() == "ipv6"
            endpoint = env.get(argument) or ("http://[fd00:ec2::254]" if ipv6 else "http://169.254.169.254")
        self._off = _is_true(env, "AWS_EC2_METADATA_DISABLED")
        self._v1_allowed = not _is_true(env, "AWS_EC2_METADATA_V1_DISABLED")
        self._client = MetadataClient(endpoint, argument=argument, read_s=_timeout(env))
        self._interval, self._clock = interval, clock or Clock()

    def watch(self, emit: Callable[[PreemptionNotice], None], stop: threading.Event) -> None:
        """See `NoticeSource.watch`."""
        if self._off:
            logger.info("EC2's metadata service is not asked: AWS_EC2_METADATA_DISABLED=true")
            return
        imds = _Imds(self._client, stop, self._clock, v1_allowed=self._v1_allowed)
        poll("EC2's metadata service", _Rounds(imds, emit, self._clock, self._interval), stop, self._interval)

    def wake(self) -> None:
        """See `Wakeable.wake`."""
        self._client.wake()


class _Off(Exception):  # noqa: N818 - a state of the service
    """IMDS is switched off, or forbids the request."""


class _Imds:
    """GET with the token of version 2, or without one where there is none to be had."""

    def __init__(self, client: MetadataClient, stop: threading.Event, clock: Clock, *, v1_allowed: bool) -> None:
        self._client, self._stop, self._now, self._v1_allowed = client, stop, clock.monotonic, v1_allowed
        self._token: str | None = None
        self._expires = 0.0
        self._v1_until = 0.0
        self._hinted = False

    def get(self, path: str) -> Answer:
        """Ask for a path.

        Raises:
            _Off: 403.
            OSError: No answer.
        """
        answer = self._get(path, self._fresh_token())
        if answer.status == 401:  # expired, or of another instance: a hibernated machine woke up
            self._token, self._v1_until = None, 0.0
            token = self._fresh_token()
            if token is not None or answer.status != 401:
                answer = self._get(path, token)
        if answer.status == 403:
            self._token = None
            raise _Off
        if answer.status == 401:
            if self._token is None:
                self._hint()
            self._token, self._v1_until = None, 0.0
            raise unexpected(answer, path)
        return answer

    def _get(self, path: str, token: str | None) -> Answer:
        headers = {} if token is None else {"X-aws-ec2-metadata-token": token}
        return self._client.get(path, headers, stop=self._stop)

    def _fresh_token(self) -> str | None:
        """A token that lives on for a while; None where only version 1 answers."""
        now = self._now()
        if self._token is not None and self._expires - now >= min(_SPARE_S, _TTL_S / 2):
            return self._token
        if now < self._v1_until:
            return None
        self._token, status = None, 0
        try:
            answer = self._client.request("PUT", _TOKEN, {_TTL: str(_TTL_S)}, stop=self._stop)
            status = answer.status
        except TimeoutError:
            # From inside a container the request arrives, and its answer is lost on the way: its IP packets may make one hop only.
            if not self._v1_allowed:
                self._hint()
                raise
        else:
            if status == 200 and (token := answer.text.strip()):
                self._token, self._expires = token, now + _seconds(answer.headers.get(_TTL.lower()))
                return token
            if status not in (403, 404, 405):
                raise unexpected(answer, _TOKEN)
            if not self._v1_allowed:
                raise _Off if status == 403 else unexpected(answer, _TOKEN)
        self._v1_until = now + _V1_S  # as botocore does: see IMDSFetcher in botocore/utils.py
        return None

    def _hint(self) -> None:
        if not self._hinted:
            self._hinted = True
            logger.warning(
                "EC2's metadata service wants a token and its answer does not reach us, as in a container that is a network hop away; "
                "interruptions will not be heard before it does. Run: aws ec2 modify-instance-metadata-options --instance-id i-... "
                "--http-put-response-hop-limit 2 --http-endpoint enabled"
            )


class _Rounds:
    """What is asked in a round, and what is made of it."""

    def __init__(self, imds: _Imds, emit: Callable[[PreemptionNotice], None], clock: Clock, interval: float) -> None:
        self._imds, self._clock, self._interval = imds, clock, interval
        self._interruption, self._advice, self._events, self._lifecycle = (Told(emit) for _ in range(4))
        self._topics: tuple[tuple[str, Callable[[Answer], None], Health, int], ...] = (
            (_REBALANCE, self._rebalance, Health("EC2's rebalance advice"), 1),
            (_MAINTENANCE, self._maintenance, Health("EC2's list of maintenance events"), _SLOW_ROUNDS),
            (_LIFECYCLE, self._target_state, Health("EC2's Auto Scaling state"), _SLOW_ROUNDS),
        )
        self._round = 0
        self._last: dict[str, Answer] = {}
        self._warned = False

    def __call__(self) -> float | None:
        try:
            self._ask(_ACTION, self._action)
            for path, read, health, every in self._topics:
                if self._round % every:
                    continue
                try:
                    self._ask(path, read)
                    health.well()
                except (OSError, ValueError) as error:  # one of the lesser ones is no reason to ask less for the one that counts
                    health.ill(error)
        except _Off:
            if not self._warned:
                logger.warning(
                    "EC2's metadata service is switched off (403): interruptions will not be heard. Run: aws ec2 "
                    "modify-instance-metadata-options --instance-id i-... --http-endpoint enabled"
                )
            self._warned = True
            return _OFF_S
        self._warned = False
        self._round += 1
        return min(_AT_RISK_S, self._interval) if self._advice.ids else None

    def _ask(self, path: str, read: Callable[[Answer], None]) -> None:
        answer = self._imds.get(path)
        if answer.status not in (200, 404):
            raise unexpected(answer, path)
        last = self._last.get(path)
        if last is None or (last.status, last.text) != (answer.status, answer.text):
            read(answer)
            self._last[path] = answer  # read once; not kept when it could not be read

    def _action(self, answer: Answer) -> None:
        if answer.status == 404:
            return
        try:
            found = json_object(answer.text)
            action, when = str(found.get("action", "interruption")), iso_time(found["time"])
            mark = f"{action} {found['time']}"
        except (ValueError, KeyError, OverflowError):
            # Something is there where there is nothing as long as nothing is planned.
            logger.warning("EC2's interruption notice has no time that can be read: %.200r", answer.text)
            self._interruption.only("interruption", "", lambda: self._stop_notice("interruption", "interruption", None))
            return
        self._interruption.only(mark, "", lambda: self._stop_notice(mark, action, when))

    def _stop_notice(self, notice_id: str, action: str, when: float | None) -> PreemptionNotice:
        now = self._clock.monotonic()
        deadline = now + _LEAD_S if when is None else self._clock.deadline(when)
        detail = f"EC2 spot {action}"
        if action == "hibernate":  # the memory freezes at once, with no two minutes
            deadline, detail = now, "EC2 spot hibernate, which leaves no time"
        return self._notice("preemption", detail, notice_id, deadline=deadline, received=now)

    def _rebalance(self, answer: Answer) -> None:
        if answer.status == 404:
            self._advice.withdraw_all()
            return
        notice_id = f"rebalance {json_object(answer.text).get('noticeTime', '')}".rstrip()
        detail = "EC2 rebalance recommendation"
        self._advice.only(notice_id, "", lambda: self._notice("rebalance", detail, notice_id, action="save"))

    def _maintenance(self, answer: Answer) -> None:
        events = json.loads(answer.text) if answer.status == 200 else []
        if not isinstance(events, list):
            raise ValueError(f"not a JSON array: {answer.text[:40]!r}")  # noqa: TRY004 - of the text, not of a caller
        active: set[str] = set()
        for event in events:
            if not isinstance(event, dict) or event.get("State") != "active":
                continue
            notice_id = str(event.get("EventId") or f"{event.get('Code')} {event.get('NotBefore')}")
            active.add(notice_id)
            self._tell_event(notice_id, event)
        for notice_id in self._events.ids:
            if notice_id not in active:
                self._events.withdraw(notice_id)

    def _tell_event(self, notice_id: str, event: dict[str, Any]) -> None:
        code, not_before = event.get("Code"), event.get("NotBefore")
        try:
            deadline: float | None = self._clock.deadline(http_time(not_before))
        except (ValueError, OverflowError):
            deadline = None
        detail = f"EC2 maintenance: {code}, not before {not_before}"
        self._events.tell(
            notice_id,
            (code, not_before),
            lambda: self._notice("maintenance", detail, notice_id, deadline=deadline, action="save"),
        )

    def _target_state(self, answer: Answer) -> None:
        if answer.status == 200 and answer.text.strip() == "Terminated":
            detail = "EC2 Auto Scaling will terminate the instance"
            self._lifecycle.only("Terminated", "", lambda: self._notice("preemption", detail, "Terminated"))
        elif answer.status == 200:
            self._lifecycle.withdraw_all()

    def _notice(self, kind: str, detail: str, notice_id: str, **more: Any) -> PreemptionNotice:
        more.setdefault("received", self._clock.monotonic())
        return PreemptionNotice(source=AwsSource.name, kind=kind, detail=detail, id=notice_id, **more)


def _is_true(env: Mapping[str, str], name: str) -> bool:
    return env.get(name, "").strip().lower() == "true"


def _timeout(env: Mapping[str, str]) -> float:
    name = "AWS_METADATA_SERVICE_TIMEOUT"
    try:
        seconds = float(env.get(name) or 2.0)
    except ValueError as error:
        raise ConfigError(f"environment variable {name}={env[name]!r} is not a number of seconds") from error
    if not 0 < seconds < 3600:
        raise ConfigError(f"environment variable {name}={env[name]!r} must be a time above zero")
    return seconds


def _seconds(text: str | None) -> float:
    """What a token has to live, as the service says; it need not say."""
    try:
        return float(text or _TTL_S)
    except ValueError:
        return float(_TTL_S)
