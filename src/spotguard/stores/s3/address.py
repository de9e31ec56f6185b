"""Where a run stands in S3."""

import dataclasses
import re

from spotguard.errors import ConfigError

__all__ = ["S3Address"]

_ARN = re.compile(r"(arn:[a-z0-9-]+:s3[a-z0-9-]*:[a-z0-9-]*:\d*:accesspoint[/:][A-Za-z0-9.-]+)(?:/(.*))?")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")
_LONGEST = 850  # bytes of a prefix


@dataclasses.dataclass(frozen=True)
class S3Address:
    """A bucket and a prefix.

    Attributes:
        bucket: Its name, the alias of an access point, or the ARN of an access point.
        prefix: What all keys begin with: empty, or ending at a slash.

    Example:
        >>> S3Address.parse("s3://bucket/team/run-17/")
        S3Address(bucket='bucket', prefix='team/run-17/')
        >>> S3Address.parse("s3://arn:aws:s3:eu-west-1:123456789012:accesspoint/ours/run-17").prefix
        'run-17/'
    """

    bucket: str
    prefix: str

    @classmethod
    def parse(cls, uri: str) -> "S3Address":
        """Read a URI.

        Raises:
            ConfigError: It is no S3 URI, or it names a whole bucket: a run needs a prefix of its own.
        """
        if not isinstance(uri, str):
            raise ConfigError(f"uri={uri!r} is no text; write s3://bucket/run-17")
        scheme, _, rest = uri.partition("://")
        match = _ARN.fullmatch(rest)
        bucket, path = (match[1], match[2] or "") if match else (rest.partition("/")[0], rest.partition("/")[2])
        if scheme not in ("s3", "s3a") or not (match or _BUCKET.fullmatch(bucket)):
            raise ConfigError(f"uri={uri!r} is no S3 URI; write s3://bucket/run-17, or s3://<access point ARN>/run-17")
        if "?" in path or "#" in path:
            raise ConfigError(f"uri={uri!r}: options are not part of the URI; give them to S3CheckpointStore")
        if not path.isprintable() or path != path.strip():
            raise ConfigError(
                f"uri={uri!r} has a space at its end, or a character that cannot be seen; write it without"
            )
        parts = [part for part in path.split("/") if part]
        if not parts:
            raise ConfigError(
                f"uri={uri!r} names a whole bucket; give the run a prefix of its own, as in {uri.rstrip('/')}/run-17"
            )
        if any(part in (".", "..") for part in parts):
            raise ConfigError(f"uri={uri!r}: '.' and '..' mean nothing in S3; write the prefix out")
        if len("/".join(parts).encode()) > _LONGEST:
            raise ConfigError(
                f"uri={uri[:40]!r}...: the prefix has more than {_LONGEST} bytes; S3 takes keys of 1024, and those of a run need the rest"
            )
        return cls(bucket, "/".join(parts) + "/")

    @property
    def uri(self) -> str:
        """In the form that `parse` takes."""
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def resource(self, partition: str = "aws", *, objects: bool = False) -> str:
        """The bucket, or the objects below the prefix, as a policy names them.

        Args:
            partition: Of the region: ``"aws"``, ``"aws-cn"``, ``"aws-us-gov"``.
            objects: Those, not the bucket.

        Example:
            >>> S3Address("bucket", "run-17/").resource(objects=True)
            'arn:aws:s3:::bucket/run-17/*'
        """
        below = f"{self.prefix}*" if objects else ""
        if self.bucket.startswith("arn:"):
            return f"{self.bucket}/object/{below}" if objects else self.bucket
        if self.bucket.endswith("-s3alias"):  # a policy takes the ARN only, and that is not known
            return f"{'objects ' * objects}{below}{' of ' * objects}the access point {self.bucket}"
        return f"arn:{partition}:s3:::{self.bucket}{'/' * objects}{below}"
