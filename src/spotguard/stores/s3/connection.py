"""A boto3 client, with errors in our words and retries that know a deadline."""

import base64
import contextlib
import functools
import hashlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import tenacity

from spotguard._retry import FullJitter, draw_apart
from spotguard.errors import DeadlineExceededError, ObjectExistsError, ObjectNotFoundError, TransientStoreError
from spotguard.stores.s3.address import S3Address
from spotguard.stores.s3.body import send_as_it_is
from spotguard.stores.s3.errors import translate
from spotguard.stores.s3.options import S3Options
from spotguard.stores.s3.throughput import Throughput

__all__ = ["Answer", "Connection"]

logger = logging.getLogger(__name__)

Answer = dict[str, Any]
_T = TypeVar("_T")
_TRIES, _LONGEST_WAIT_S, _BRIEF_S = 8, 8.0, 0.02
_PATIENCE_S = 10.0  # of whoever waits without a word
_AHEAD = 256 << 10  # bytes that the system holds and has not begun to send
_making = threading.Lock()  # sessions of boto3 must not be used by two threads at once


def _renew_lock() -> None:
    """In a forked child, the thread that held it is not there."""
    global _making
    _making = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


class Connection:
    """What sends requests.

    Args:
        address: The bucket and the prefix.
        options: How.
        session: A session of boto3, where the usual chain is not what is wanted.

    Attributes:
        up: How fast it is to the server.
        down: And from it.
        wants_part_checksums: The server wants the checksum of a part before its bytes, or does not say what it has computed itself.
    """

    def __init__(self, address: S3Address, options: S3Options, session: Any = None) -> None:
        self.address, self.options, self._session = address, options, session
        self._client: tuple[int, Any] | None = None
        self.up, self.down = (Throughput(options.connections, options.part_size) for _ in range(2))
        self.wants_part_checksums = False
        self._said = float("-inf")  # when a wait was last told of

    @property
    def client(self) -> Any:
        """The client of this process; made when first used. A forked child must not share sockets with its parent."""
        with _making:
            if self._client is None or self._client[0] != os.getpid():
                self._client = (os.getpid(), self._make())
            return self._client[1]

    def uri(self, key: str) -> str:
        """A key, for messages."""
        return f"{self.address.uri}/{key}"

    def call(
        self,
        operation: str,
        key: str | None = None,
        *,
        deadline: float | None = None,
        tries: int = _TRIES,
        recover: Callable[[], Answer | None] | None = None,
        check: Callable[[], None] | None = None,
        confirm: Callable[[Answer], None] | None = None,
        **params: Any,
    ) -> Answer:
        """Make a request, and again while it fails for now, with full jitter.

        Args:
            operation: Method of the client.
            key: The object, where it is about one.
            deadline: Instant (monotonic seconds) up to which it is retried; without one, a number of times.
            tries: That number.
            recover: Asked when the answer to an earlier try was lost and this one is told that the object is there, or the upload gone:
                returns what that earlier try has done, or None if it was somebody else.
            check: Called before each try; what it raises ends it.
            confirm: Called with the answer; a `TransientStoreError` of it has the request tried again.
            params: Of the request.

        Raises:
            StoreError: As the server, the network or boto3 said.
        """
        where = self.address.uri if key is None else self.uri(key)
        params |= {"Bucket": self.address.bucket} | ({} if key is None else {"Key": self.address.prefix + key})
        lost = False

        def once() -> Answer:
            nonlocal lost
            if check is not None:
                check()
            try:
                answer = self._once(operation, where, params)
                if confirm is not None:
                    confirm(answer)
            except (ObjectExistsError, ObjectNotFoundError):
                if lost and recover is not None and (done := recover()) is not None:
                    return done
                raise
            except TransientStoreError:
                lost = True
                raise
            return answer

        return self.retried(once, where, deadline=deadline, tries=tries)

    def retried(
        self, action: Callable[[], _T], where: str, *, deadline: float | None = None, tries: int = _TRIES
    ) -> _T:
        """Do something, and again while it fails for now, with full jitter.

        Raises:
            TransientStoreError: As the last try did; marked as retried enough.
            DeadlineExceededError: There is no time left for another try.
        """
        up_to = None if deadline is None else _UpTo(deadline)
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(
                lambda error: isinstance(error, TransientStoreError) and not error.exhausted
            ),
            wait=FullJitter(0.1, longest=_LONGEST_WAIT_S) if up_to is None else up_to.wait,
            stop=tenacity.stop_after_attempt(tries) if up_to is None else up_to.is_over,
            before_sleep=functools.partial(self._say_tried_again, where),
            reraise=True,
        )
        try:
            return retrying(action)
        except TransientStoreError as error:
            if deadline is not None:
                raise DeadlineExceededError(
                    f"{where} was not done by its deadline; the last trouble was: {error}"
                ) from error
            error.exhausted = True
            raise

    def _say_tried_again(self, where: str, state: tenacity.RetryCallState) -> None:
        """Whoever waits for long is told why: once a minute, not for each of many parts."""
        waited, now = state.seconds_since_start or 0.0, time.monotonic()
        loud = waited >= _PATIENCE_S and now - self._said >= 6 * _PATIENCE_S
        if loud:
            self._said = now
        logger.log(
            logging.WARNING if loud else logging.INFO,
            "%s: tried again after %s",
            where if not loud else f"{where}: no success for {waited:.0f} s",
            state.outcome and state.outcome.exception(),
        )

    def _once(self, operation: str, where: str, params: dict[str, Any]) -> Answer:
        from botocore.exceptions import BotoCoreError, ClientError
        from urllib3.exceptions import HTTPError

        try:
            answer: Answer = getattr(self.client, operation)(**params | self._payer(operation))
        except (BotoCoreError, ClientError, HTTPError, ValueError, OSError) as error:
            raise translate(error, operation=operation, where=where, params=params) from error
        return answer

    def _payer(self, operation: str) -> dict[str, str]:
        """Who pays, for every operation that can be told."""
        if not self.options.requester_pays:
            return {}
        meta = self.client.meta
        shape = meta.service_model.operation_model(meta.method_to_api_mapping[operation]).input_shape
        return {"RequestPayer": "requester"} if shape is not None and "RequestPayer" in shape.members else {}

    def _make(self) -> Any:
        import boto3
        import botocore.utils
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError

        options = self.options
        draw_apart(botocore.utils)  # jitter when the credentials of an instance are renewed
        try:
            session = self._session or boto3.Session(profile_name=options.profile, region_name=options.region)
            client = session.client(
                "s3",
                region_name=options.region,
                endpoint_url=options.endpoint_url,
                config=Config(
                    # Checksums are ours to choose: the trailers that boto3 sends by itself are refused by many servers over TLS.
                    request_checksum_calculation="when_required",
                    response_checksum_validation="when_required",
                    retries={"total_max_attempts": 1, "mode": "standard"},
                    connect_timeout=min(10.0, options.stall_s),
                    read_timeout=options.stall_s,
                    max_pool_connections=2 * options.connections + 4,
                    tcp_keepalive=True,
                    use_dualstack_endpoint=options.dualstack or None,
                    signature_version="s3v4",
                    user_agent_extra="spotguard",
                    s3={"addressing_style": options.addressing},
                ),
            )
        except (BotoCoreError, ValueError) as error:
            raise translate(error, operation="client", where=self.address.uri, params={}) from error
        sign = options.payload_signing
        client.meta.config.s3["payload_signing_enabled"] = (
            not client.meta.endpoint_url.startswith("https") if sign is None else sign
        )
        events = client.meta.events
        events.register("before-sign.s3", _without_expect)
        events.register("before-sign.s3.DeleteObjects", _with_md5)
        events.register("before-send.s3", send_as_it_is)
        _notice_dead_peers(client, options.stall_s)
        return client


def _without_expect(request: Any, **_: Any) -> None:
    """A server that does not know ``Expect: 100-continue`` would cost a second for each part."""
    if "Expect" in request.headers:
        del request.headers["Expect"]


def _with_md5(request: Any, **_: Any) -> None:
    """Servers that do not know boto3's checksums want the older one for a batch of deletes."""
    body = request.data if isinstance(request.data, bytes) else b""
    if body and "Content-MD5" not in request.headers:
        request.headers["Content-MD5"] = base64.b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()


def _notice_dead_peers(client: Any, stall_s: float) -> None:
    """Have the system give up a connection whose peer takes nothing for that long: tcp(7), TCP_USER_TIMEOUT.

    And have it take no more than a little ahead of what is on its way (TCP_NOTSENT_LOWAT): megabytes that wait in its buffer on a slow link
    would look like a server that does not answer.

    boto3 has no setting for it. Where its inside looks different one day, the timeouts of the socket remain.
    """
    wanted = {"TCP_USER_TIMEOUT": int(stall_s * 1000), "TCP_NOTSENT_LOWAT": _AHEAD}
    with contextlib.suppress(AttributeError):
        options = client._endpoint.http_session._socket_options  # noqa: SLF001
        for name, value in wanted.items():
            if (option := getattr(socket, name, None)) is not None:
                options.append((socket.IPPROTO_TCP, option, value))


class _UpTo:
    """Waits and ends so that there is one more try shortly before the deadline.

    Args:
        deadline: Instant (monotonic seconds).
    """

    def __init__(self, deadline: float) -> None:
        self._deadline, self._wait = deadline, FullJitter(0.1, longest=_LONGEST_WAIT_S)

    def wait(self, state: tenacity.RetryCallState) -> float:
        """Seconds before the next try: never more than half of what is left."""
        return min(self._wait(state), max(0.0, self._deadline - time.monotonic()) / 2)

    def is_over(self, state: tenacity.RetryCallState) -> bool:  # noqa: ARG002 - tenacity gives it
        """Whether another try would have no time to come to anything."""
        return time.monotonic() + _BRIEF_S >= self._deadline
