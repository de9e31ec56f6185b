"""Compute Engine: two keys of the metadata server, each followed by a long poll.

Requests and codes are those of the documentation of the metadata server; patience and retries those of Google's guest agent and of its
client for Go, which sleep 5 s after an error and wait 60 s for a change.
"""

import logging
import os
import threading
import time
import urllib.parse
from collections.abc import Callable

from spotguard.notices.base import PreemptionNotice
from spotguard.notices.metadata import Answer, MetadataClient, Poller, number_from

__all__ = ["GoogleSource"]

logger = logging.getLogger(__name__)

_WAIT_S, _FLOOR_S = 60, 1.0  # of a long poll; and between two calls to a server that answers at once
_POWER_OFF_S = 30.0  # from the soft off to the mechanical one, best effort
_ABSENT = 3  # times that the key is not there before it is asked for seldom
_SELDOM = 20  # times the usual interval: a metadata server that was not ready yet, as in GKE, has the key after all
_NAME, _ADDRESS = "metadata.google.internal", "169.254.169.254"
_HEADERS = {"Metadata-Flavor": "Google"}


class GoogleSource:
    """Waits for ``instance/preempted`` and ``instance/maintenance-event``.

    Args:
        host: Of the metadata server; by default ``GCE_METADATA_HOST``, else the name that Google has for it.
        notice_duration: Seconds of the VM's ``preemptionNoticeDuration``, which it cannot read itself.
        floor: Least seconds between two requests for one key.

    Example:
        >>> GoogleSource("127.0.0.1:8080").name
        'google'
    """

    name = "google"

    def __init__(self, host: str | None = None, *, notice_duration: float = 0.0, floor: float = _FLOOR_S) -> None:
        env = os.environ
        where = host or env.get("GCE_METADATA_HOST") or env.get("GCE_METADATA_ROOT") or env.get("GCE_METADATA_IP")
        self._disabled = host is None and env.get("NO_GCE_CHECK", "").lower() == "true"
        self._client = MetadataClient(
            where or _NAME, timeout=number_from("GCE_METADATA_TIMEOUT", None), fallback="" if where else _ADDRESS
        )
        self._absent = int(number_from("GCE_METADATA_DETECT_RETRIES", _ABSENT, least=1) or _ABSENT)
        self._mtls = env.get("GCE_METADATA_MTLS_MODE", "none").lower()
        self._grace, self._floor = notice_duration + _POWER_OFF_S, floor

    def watch(self, emit: Callable[[PreemptionNotice], None], stop: threading.Event) -> None:
        """See `NoticeSource.watch`."""
        if self._disabled:
            return
        if self._mtls != "none":
            logger.warning("%s: GCE_METADATA_MTLS_MODE=%s is not supported: plain HTTP is used", self.name, self._mtls)
        keys = [_Key("preempted", self._preempted), _Key("maintenance-event", _maintained)]
        threads = [
            threading.Thread(
                target=Poller(f"{self.name} {key.name}", self._floor, longest=30.0).run,
                args=(lambda key=key: self._ask(key, emit), stop),
                name=f"spotguard-{self.name}-{key.name}",
                daemon=True,
            )
            for key in keys
        ]
        with self._client.watching():
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

    def wake(self) -> None:
        """See `Wakeable`."""
        self._client.interrupt()

    def get(self, path: str, *, wait: bool = False, etag: str = "", read_s: float | None = None) -> Answer:
        """One value, such as ``instance/zone``; with `wait`, when it is another than that with `etag`.

        Raises:
            OSError: No answer, or not one of Google's.
        """
        query = {"wait_for_change": "true", "timeout_sec": str(_WAIT_S), "last_etag": etag} if wait else {}
        path = f"/computeMetadata/v1/{path}" + (f"?{urllib.parse.urlencode(query)}" if query else "")
        answer = self._client.get(path, _HEADERS, read_s=_WAIT_S + 10 if wait else read_s)
        if answer.status == 200 and answer.headers.get("metadata-flavor") != "Google":
            raise ConnectionError("who answers is not Google's metadata server")
        return answer

    def _ask(self, key: "_Key", emit: Callable[[PreemptionNotice], None]) -> float | None:
        began = time.monotonic()
        # The first look does not wait: it may have happened before we were there.
        answer = self.get(f"instance/{key.name}", wait=key.etag is not None, etag=key.etag or "")
        if answer.status == 404:
            key.etag = None
            key.absent += 1
            return None if key.absent < self._absent else _SELDOM * self._floor
        if answer.status != 200:
            key.etag = None
            raise ConnectionError(f"{key.name}: status {answer.status}")
        key.etag, key.absent = answer.headers.get("etag"), 0
        value = answer.text.upper()
        if value != key.value:
            if key.notice is not None:
                emit(key.notice.withdrawn())
            key.value, key.notice = value, key.parse(value)
            if key.notice is not None:
                emit(key.notice)
        return max(0.0, self._floor - (time.monotonic() - began))

    def _preempted(self, value: str) -> PreemptionNotice | None:
        if value != "TRUE":
            return None
        return PreemptionNotice(
            source=self.name,
            kind="preemption",
            detail="Compute Engine: preempted",
            id="preempted",
            grace=self._grace,
        )


class _Key:
    """One of the keys that are followed."""

    def __init__(self, name: str, parse: Callable[[str], PreemptionNotice | None]) -> None:
        self.name, self.parse = name, parse
        self.etag: str | None = None
        self.value = ""
        self.absent = 0
        self.notice: PreemptionNotice | None = None


def _maintained(value: str) -> PreemptionNotice | None:
    if value in ("NONE", ""):
        return None
    return PreemptionNotice(
        source=GoogleSource.name,
        kind="maintenance",
        detail=f"Compute Engine: {value.lower().replace('_', ' ')}",
        id=f"maintenance {value}",
        action="save",
    )
