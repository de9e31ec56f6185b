"""How to talk to an S3 server. Every default is right for Amazon's."""

import dataclasses
from typing import Any, Literal

from spotguard.errors import ConfigError

__all__ = ["S3Options"]

_MIB = 1 << 20
_UNITS = {"part_size": "bytes", "connections": "connections", "stall_s": "seconds"}


@dataclasses.dataclass(frozen=True)
class S3Options:
    """Options of an `S3ObjectStore`. Credentials, region and endpoint come from the usual boto3 chain where they are not given.

    Attributes:
        versioning: ``"auto"`` uses versions if the bucket keeps them and warns once if not; ``"require"`` refuses a bucket that does not;
            ``"enable"`` turns them on.
        single_writer: Accept a server that cannot create exclusively: the user promises that no two processes write to the run at once.
        profile: Name of a profile in the AWS configuration.
        region: Region of the bucket.
        endpoint_url: Address of another server than Amazon's; ``AWS_ENDPOINT_URL_S3`` does the same.
        addressing: ``"path"`` puts the bucket into the path, ``"virtual"`` into the host name.
        dualstack: Use the endpoints that IPv6 reaches.
        requester_pays: Agree to pay for requests to somebody else's bucket.
        sse: Encryption by the server: ``"AES256"``, ``"aws:kms"`` or ``"aws:kms:dsse"``; None leaves it to the bucket.
        kms_key_id: Key for ``"aws:kms"``; None uses the account's own.
        customer_key: 32 bytes: the server encrypts with this key and forgets it (SSE-C).
        payload_signing: Sign a hash of every byte that is sent. None does so over plain http, and not over https, where TLS protects them.
            It costs a second of a core for each 1.8 GB.
        part_size: Bytes that are sent, or read, in one request; more of them go in parts of equal size. Those of large objects have up to
            four times that, eight times where the network is very fast, and more where 10,000 parts would not be enough.
        connections: Parts on their way at once; no more than this process has cores, where one of them moves more than 200 MB a second.
        stall_s: Seconds without progress after which a transfer is given up and tried again.

    Example:
        >>> S3Options(versioning="require").put_params
        {}
        >>> S3Options(sse="aws:kms", kms_key_id="alias/ours").put_params
        {'ServerSideEncryption': 'aws:kms', 'SSEKMSKeyId': 'alias/ours'}
    """

    versioning: Literal["auto", "require", "enable"] = "auto"
    single_writer: bool = False
    profile: str | None = None
    region: str | None = None
    endpoint_url: str | None = None
    addressing: Literal["auto", "path", "virtual"] = "auto"
    dualstack: bool = False
    requester_pays: bool = False
    sse: Literal["AES256", "aws:kms", "aws:kms:dsse"] | None = None
    kms_key_id: str | None = None
    customer_key: bytes | None = dataclasses.field(default=None, repr=False)
    payload_signing: bool | None = None
    part_size: int = 32 * _MIB
    connections: int = 4
    stall_s: float = 20.0

    def __post_init__(self) -> None:
        choices: dict[str, tuple[object, ...]] = {
            "versioning": ("auto", "require", "enable"),
            "addressing": ("auto", "path", "virtual"),
            "sse": (None, "AES256", "aws:kms", "aws:kms:dsse"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name}={getattr(self, name)!r}: must be one of {', '.join(map(repr, allowed))}")
        for name in ("part_size", "connections", "stall_s"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float) if name == "stall_s" else int):
                raise ConfigError(f"{name}={value!r}: must be a number, of {_UNITS[name]}")
        if self.endpoint_url is not None and "://" not in self.endpoint_url:
            raise ConfigError(
                f"endpoint_url={self.endpoint_url!r}: begin it with https:// or http://, as in http://{self.endpoint_url}"
            )
        if self.kms_key_id is not None and self.sse not in ("aws:kms", "aws:kms:dsse"):
            raise ConfigError(f"kms_key_id={self.kms_key_id!r} is used with sse='aws:kms' only; sse is {self.sse!r}")
        key: object = self.customer_key
        if key is not None and (not isinstance(key, bytes) or len(key) != 32 or self.sse is not None):
            raise ConfigError("customer_key: give exactly 32 bytes, and no sse beside it")
        if not 5 * _MIB <= self.part_size <= 5120 * _MIB:
            raise ConfigError(f"part_size={self.part_size}: S3 takes parts of 5 MiB to 5 GiB")
        if not 1 <= self.connections <= 64:
            raise ConfigError(f"connections={self.connections}: must be 1 to 64")
        if not self.stall_s >= 1:
            raise ConfigError(f"stall_s={self.stall_s}: must be 1 second or more")

    @property
    def put_params(self) -> dict[str, Any]:
        """Parameters of every request that begins an object."""
        params: dict[str, Any] = {}
        if self.sse is not None:
            params["ServerSideEncryption"] = self.sse
        if self.kms_key_id is not None:
            params["SSEKMSKeyId"] = self.kms_key_id
        return {**params, **self.get_params}

    @property
    def get_params(self) -> dict[str, Any]:
        """Parameters of every request about the bytes of an object."""
        return (
            {} if self.customer_key is None else {"SSECustomerAlgorithm": "AES256", "SSECustomerKey": self.customer_key}
        )
