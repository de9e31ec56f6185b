"""The instance metadata service of EC2, with session tokens (IMDSv2), or without where only that works.

Codes and times are those of the EC2 user guide ("Use IMDSv2") and of botocore, whose environment variables are honoured.
"""

import os
import time
from collections.abc import Callable, Mapping

from spotguard.notices.metadata import Answer, MetadataClient, number_from

__all__ = ["OFF_S", "Imds"]

OFF_S = 300.0
"""Seconds between two looks whether what was refused is allowed by now."""

_TTL_S, _RENEW_S = 21600, 60.0  # of a token; it is renewed when less than this is left
_AGAIN_S = 5.0  # after a renewal that failed, while the token is still good
_TOKEN, _DATA = "/latest/api/token", "/latest/meta-data/"
_HOP_HINT = (
    "the instance metadata service refuses requests without a token, and the token does not reach this process: in a container the hop "
    "limit has to be 2. Run: aws ec2 modify-instance-metadata-options --instance-id ID "
    "--http-put-response-hop-limit 2 --http-endpoint enabled"
)


class Imds:
    """One item of the metadata after another.

    Args:
        endpoint: Its base; by default ``AWS_EC2_METADATA_SERVICE_ENDPOINT``, else the address that EC2 has.
        warn: Called with what a person should read.

    Attributes:
        client: What it sends requests with.

    Example:
        >>> Imds(None, print).client.base
        'http://169.254.169.254'
    """

    def __init__(self, endpoint: str | None, warn: Callable[[str], None]) -> None:
        env = os.environ
        ipv6 = env.get("AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE", "").lower() == "ipv6"
        usual = "http://[fd00:ec2::254]" if ipv6 else "http://169.254.169.254"
        self.client = MetadataClient(
            endpoint or env.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or usual,
            timeout=number_from("AWS_METADATA_SERVICE_TIMEOUT", None),
            attempts=int(number_from("AWS_METADATA_SERVICE_NUM_ATTEMPTS", 1, least=1) or 1),
        )
        self._tokenless = env.get("AWS_EC2_METADATA_V1_DISABLED", "").lower() != "true"
        self._warn = warn
        self._token: str | None = None
        self._expires = self._renew_at = 0.0

    def get(self, path: str) -> Answer:
        """One item, such as ``instance-life-cycle``.

        Raises:
            OSError: No answer.
        """
        if time.monotonic() > self._renew_at:
            self._renew()
        answer = self._send(path)
        if answer.status == 401 and self._token is not None:  # expired early: the instance was stopped in between
            self._token = None
            self._renew()
            answer = self._send(path)
        if answer.status == 401:
            self.renew_next()
            self._warn(_HOP_HINT)
            raise PermissionError("the metadata service wants a token, and gives none")
        return answer

    def renew_next(self) -> None:
        """Have the next request preceded by one for a token."""
        self._renew_at = 0.0

    def _send(self, path: str) -> Answer:
        return self.client.get(_DATA + path, {"X-aws-ec2-metadata-token": self._token} if self._token else {})

    def _renew(self) -> None:
        """Get a token; where there is none to be had, keep the one we have while it is good, else go without where that is allowed."""
        try:
            answer = self.client.ask("PUT", _TOKEN, {"X-aws-ec2-metadata-token-ttl-seconds": str(_TTL_S)})
        except OSError as error:
            trouble, without = str(error), isinstance(error, TimeoutError)  # an answer that gets lost on a hop too many
        else:
            if answer.status == 200 and answer.text and answer.text.isascii() and answer.text.isprintable():
                self._token, self._expires = answer.text, time.monotonic() + _lifetime(answer.headers)
                self._renew_at = self._expires - _RENEW_S
                return
            trouble, without = f"status {answer.status}", answer.status in (403, 404, 405)
        if self._token is not None and time.monotonic() < self._expires:
            self._renew_at = time.monotonic() + _AGAIN_S
            return
        self._token = None
        if not without:
            raise ConnectionError(f"no token: {trouble}")
        if not self._tokenless:
            self._warn(_HOP_HINT)
            raise ConnectionError(f"no token, and AWS_EC2_METADATA_V1_DISABLED is set: {trouble}")
        self._renew_at = time.monotonic() + OFF_S  # without a token for that long, then another try


def _lifetime(headers: Mapping[str, str]) -> float:
    try:
        return float(headers.get("x-aws-ec2-metadata-token-ttl-seconds", _TTL_S))
    except ValueError:
        return float(_TTL_S)
