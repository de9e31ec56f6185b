"""What a server or boto3 said, in our words and with a remedy."""

import datetime as dt
import email.utils
import re
from typing import Any

from spotguard._time import utc_now
from spotguard.errors import (
    ConfigError,
    ObjectExistsError,
    ObjectNotFoundError,
    SpotguardError,
    StoreAccessError,
    StoreError,
    TransientStoreError,
)

__all__ = ["AccessDeniedError", "ArrivedDamagedError", "NotOfferedError", "code_of", "permission", "translate"]


class AccessDeniedError(StoreAccessError):
    """A permission is missing.

    Attributes:
        permission: Its name in a policy, such as ``s3:PutObject``: as the server says, else as the operation needs it.
        said: What the server said.
    """

    permission = ""
    said = ""


class ArrivedDamagedError(StoreError):
    """The parts do not make the object whose checksum we have told, or another writer was in the way: the upload has to begin anew."""


class NotOfferedError(StoreError):
    """The server does not know the operation, or not with these parameters."""


# Which permission an operation needs: https://docs.aws.amazon.com/AmazonS3/latest/userguide/using-with-s3-policy-actions.html
_PERMISSIONS = {
    "put_object": "s3:PutObject",
    "create_multipart_upload": "s3:PutObject",
    "upload_part": "s3:PutObject",
    "complete_multipart_upload": "s3:PutObject",
    "abort_multipart_upload": "s3:AbortMultipartUpload",
    "get_object": "s3:GetObject",
    "head_object": "s3:GetObject",
    "delete_object": "s3:DeleteObject",
    "delete_objects": "s3:DeleteObject",
    "list_objects_v2": "s3:ListBucket",
    "list_object_versions": "s3:ListBucketVersions",
    "list_multipart_uploads": "s3:ListBucketMultipartUploads",
    "get_bucket_versioning": "s3:GetBucketVersioning",
    "put_bucket_versioning": "s3:PutBucketVersioning",
    "get_object_lock_configuration": "s3:GetBucketObjectLockConfiguration",
    "get_bucket_lifecycle_configuration": "s3:GetLifecycleConfiguration",
    "put_bucket_lifecycle_configuration": "s3:PutLifecycleConfiguration",
}
_WITH_VERSION = {"s3:GetObject": "s3:GetObjectVersion", "s3:DeleteObject": "s3:DeleteObjectVersion"}

# Codes: https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
_MISSING = {"NoSuchKey", "NoSuchVersion", "NoSuchUpload", "NotFound", "404"}
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"}
_WRONG_CREDENTIALS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "AuthorizationHeaderMalformed"}
_BROKEN_ON_THE_WAY = {
    "BadDigest",
    "InvalidDigest",
    "XAmzContentSHA256Mismatch",
    "XAmzContentChecksumMismatch",
    "IncompleteBody",
    "RequestTimeout",
}
_BUSY = {
    "SlowDown", "ServiceUnavailable", "InternalError", "OperationAborted", "ConditionalRequestConflict",
    "RequestLimitExceeded", "Throttling", "ThrottlingException", "TooManyRequests",
}  # fmt: skip
_NOT_OFFERED = {
    "NotImplemented",
    "MethodNotAllowed",
    "MissingContentMD5",
    "MissingContentLength",
    "UnsupportedOperation",
}
_FULL = {"InsufficientStorage", "QuotaExceeded", "XMinioStorageFull", "EntityTooLarge"}
_REACH = "check the network, the region, and endpoint_url or AWS_ENDPOINT_URL_S3 where the server is not Amazon's"
# Amazon's message for whoever is denied: https://docs.aws.amazon.com/AmazonS3/latest/userguide/troubleshoot-403-errors.html
_NAMED = re.compile(r"not authorized to perform: ([A-Za-z0-9-]+:\w+)")
# The end of an upload that met another writer is not to be asked for again, as opposed to a PUT that did:
# https://docs.aws.amazon.com/AmazonS3/latest/API/API_CompleteMultipartUpload.html
_UPLOAD_SPENT = {"BadDigest", "XAmzContentChecksumMismatch", "ConditionalRequestConflict"}


def code_of(error: BaseException) -> str:
    """The code that the server gave, or that of the HTTP status; empty where no server has spoken."""
    response = getattr(error, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def translate(error: Exception, *, operation: str, where: str, params: dict[str, Any]) -> Exception:
    """Make an error of ours of what boto3 raised.

    Args:
        error: From botocore.
        operation: Such as ``"put_object"``.
        where: URI of the object or of the run, for the message.
        params: Of the request.

    Returns:
        The error to raise.
    """
    from botocore import exceptions as boto

    if isinstance(error, SpotguardError):  # ours already: a client could not be made
        return error
    if isinstance(error, boto.ClientError):
        return _from_server(error, operation, where, params)
    inner = getattr(error, "kwargs", {}).get("error")
    if isinstance(inner, (SpotguardError, InterruptedError)):  # raised by a body while it was being sent
        return inner
    if isinstance(
        error,
        (boto.NoCredentialsError, boto.PartialCredentialsError, boto.NoAuthTokenError, boto.UnauthorizedSSOTokenError),
    ):
        return StoreAccessError(
            f"{where}: {error}; set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the instance a role"
        )
    if isinstance(error, (boto.CredentialRetrievalError, boto.SSOTokenLoadError, boto.TokenRetrievalError)):
        return TransientStoreError(f"{where}: the credentials could not be had: {error}")
    if isinstance(error, boto.SSLError):
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            return StoreAccessError(f"{where}: {error}; AWS_CA_BUNDLE names the certificate of a server of your own")
        if "WRONG_VERSION_NUMBER" in str(error):
            return StoreAccessError(
                f"{where}: {error}; the server does not speak TLS there: begin endpoint_url, or AWS_ENDPOINT_URL_S3, with http://"
            )
        return TransientStoreError(f"{where}: {error}")
    wrong = (
        boto.ParamValidationError,
        boto.ProfileNotFound,
        boto.EndpointProviderError,
        boto.InvalidRegionError,
        boto.UnsupportedS3ConfigurationError,
        boto.UnsupportedS3ArnError,
        ValueError,
    )
    if isinstance(error, wrong):
        scheme = "; begin it with https:// or http://" if "nvalid endpoint" in str(error) else ""
        return ConfigError(f"{where}: {error}{scheme}")
    return TransientStoreError(f"{where}: {_of_network(error)}")


def _of_network(error: Exception) -> str:
    from botocore import exceptions as boto

    inner = getattr(error, "kwargs", {}).get("error")
    text = f"{error}" if inner is None or str(inner) in str(error) else f"{error} ({inner})"
    return f"{text}; {_REACH}" if isinstance(error, (boto.EndpointConnectionError, boto.ConnectTimeoutError)) else text


def _from_server(error: Any, operation: str, where: str, params: dict[str, Any]) -> Exception:
    code, answer = code_of(error), error.response
    status = int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    said = f"{code}: {answer.get('Error', {}).get('Message', '')}".removesuffix(": ")
    if code == "NoSuchBucket":
        return StoreAccessError(
            f"{where}: the bucket does not exist; check its name and the region, or make it: aws s3 mb s3://{params.get('Bucket')}"
        )
    if code in _UPLOAD_SPENT and operation == "complete_multipart_upload":
        return ArrivedDamagedError(f"{where}: {said}")
    if code in _BUSY or code in _BROKEN_ON_THE_WAY or status in (429, 500, 502, 503, 504):
        return TransientStoreError(f"{where}: {said}")
    if code in _EXPIRED:
        return TransientStoreError(
            f"{where}: the credentials have expired and were not renewed ({said}); log in again, or use a role"
        )
    if code == "RequestTimeTooSkewed":
        return StoreAccessError(
            f"{where}: the clock of this machine is {_skew(answer)}; set it right (chronyc makestep) and start again"
        )
    if code in _WRONG_CREDENTIALS:
        return StoreAccessError(
            f"{where}: the credentials are refused ({said}); check AWS_PROFILE, the keys and the region"
        )
    if code == "InvalidObjectState":
        return StoreError(f"{where} has been moved to an archive; restore it first: aws s3api restore-object")
    if status == 412 or code == "PreconditionFailed":
        return ObjectExistsError(f"{where} exists already")
    if status == 403 or code in ("AccessDenied", "403", "Forbidden", "AllAccessDisabled"):
        named = _NAMED.search(said)
        needed = named[1] if named else permission(operation, params)
        denied = AccessDeniedError(f"{where}: access denied ({said}); the permission that is needed: {needed}")
        denied.permission, denied.said = needed, said
        return denied
    refused = status == 405 or code in ("405", "MethodNotAllowed")
    if "Key" not in params and code in ("NoSuchKey", "NotFound", "404"):
        return StoreAccessError(
            f"{where}: the server does not know the bucket, and does not say so as S3 does ({said}); is it an S3 server? "
            "Check endpoint_url, or AWS_ENDPOINT_URL_S3: it is the address of the server alone, without the bucket"
        )
    # A version that is a delete marker can be neither read nor asked about.
    if code in _MISSING or status == 404 or (refused and operation in ("get_object", "head_object")):
        return ObjectNotFoundError(
            f"{where} does not exist ({code})" if code == "NoSuchUpload" else f"{where} does not exist"
        )
    if params.get("VersionId") and code in ("InvalidArgument", "NoSuchVersion", "400"):
        return ObjectNotFoundError(
            f"{where} does not exist in version {params['VersionId']}"
        )  # an id of another bucket
    if code in _FULL or status == 507:
        return StoreError(
            f"{where}: the server has no room ({said}); free space or keep fewer checkpoints ('spotguard prune')"
        )
    if code == "PermanentRedirect":
        return ConfigError(f"{where}: the bucket is elsewhere ({said}); set region, or AWS_REGION")
    if refused or status == 501 or code in _NOT_OFFERED:
        return NotOfferedError(f"{where}: the server does not know {operation} ({said})")
    return StoreError(f"{where}: the server refuses {operation} with status {status}, {said}")


def permission(operation: str, params: dict[str, Any]) -> str:
    """Name of the permission that an operation needs, where the parameters decide with their version."""
    name = _PERMISSIONS.get(operation, f"for {operation}")
    return _WITH_VERSION.get(name, name) if params.get("VersionId") else name


def _skew(answer: dict[str, Any]) -> str:
    date = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
    try:
        server = email.utils.parsedate_to_datetime(date)
    except (TypeError, ValueError):
        return "too far off"
    off = (utc_now() - server.astimezone(dt.timezone.utc)).total_seconds()
    return f"{abs(off):.0f} s {'ahead' if off > 0 else 'behind'}"
