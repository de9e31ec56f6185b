"""What the back ends of fsspec raise, in our words. Each has a tree of its own, so names and status codes are looked at, not classes."""

import asyncio
import concurrent.futures
from typing import Any

from spotguard.errors import (
    ObjectExistsError,
    ObjectNotFoundError,
    StoreAccessError,
    StoreError,
    TransientStoreError,
)
from spotguard.stores._fsspec.drivers import Replaced, is_about_the_place

__all__ = ["NoPlaceError", "translate"]

_DENIED = {
    "ClientAuthenticationError",
    "GoogleAuthError",
    "NoCredentialsError",
    "GatedRepoError",
    "LocalTokenNotFoundError",
}
_PASSING = {
    "ClientError",  # aiohttp: connections that are refused, cut or too slow
    "RequestException",  # requests, inside gcsfs and google.auth
    "ServiceRequestError",  # Azure: the request did not get out
    "ServiceResponseError",  # Azure: the answer did not come back
    "IncompleteReadError",
    "TransportError",  # google.auth, before it is taken for a refusal: the server of tokens was not reached
    "HTTPError",
}
_TIMEOUTS = (TimeoutError, asyncio.TimeoutError, concurrent.futures.TimeoutError, ConnectionError, EOFError)


class NoPlaceError(StoreAccessError):
    """The bucket, container or repository does not exist, or is not shown."""


def translate(
    error: Exception,
    where: str,
    credentials: str,
    *,
    exclusive: bool = False,
    creating: bool = False,
    exhausted: bool = False,
) -> StoreError:
    """Turn an error of a back end into one of ours.

    Args:
        error: What was raised.
        where: URI of the object or of the store.
        credentials: Where this back end takes its credentials from, for the advice.
        exclusive: It came from an exclusive create.
        creating: It came from a create: then "not found" is about the bucket.
        exhausted: The library has tried again by itself, with patience.
    """
    if isinstance(error, StoreError):
        return error
    if type(error) is RuntimeError and isinstance(error.__cause__, Exception):
        error = error.__cause__  # huggingface_hub says only that an upload has failed
    names = {kind.__name__ for kind in type(error).__mro__}
    status, text = _status(error), f"{type(error).__name__}: {error}".strip().removesuffix(":")
    text = " ".join(text.split())[:500]
    kind: type[StoreError]
    if isinstance(error, Replaced):
        kind, advice = TransientStoreError, "was replaced or deleted while it was read; open it again"
    elif isinstance(error, FileExistsError) or (exclusive and (status in (409, 412) or "ResourceExistsError" in names)):
        kind, advice = (ObjectExistsError, "exists already") if exclusive else (StoreError, text)
    elif "ContainerNotFound" in str(getattr(error, "error_code", "")):
        kind, advice = NoPlaceError, "the container does not exist; create it, or correct the URI"
    elif is_about_the_place(error):
        kind = NoPlaceError
        advice = f"the repository does not exist, or may not be seen ({text}); create it, correct the URI, or check "
        advice += f"the credentials: {credentials}"
    elif "TransportError" not in names and (
        isinstance(error, PermissionError)
        or status in (401, 403)
        or names & _DENIED
        or "Forbidden" in str(error)[:40]  # gcsfs says it as a plain OSError without a number
    ):
        kind, advice = (
            StoreAccessError,
            f"access was refused ({text}); check the permissions, and the credentials: {credentials}",
        )
    elif isinstance(error, FileNotFoundError) or status == 404:
        kind, advice = ObjectNotFoundError, "does not exist"
        if creating:
            kind, advice = (
                NoPlaceError,
                f"the bucket or container does not exist ({text}); create it, or correct the URI",
            )
    elif status in (408, 425, 429) or (status or 0) >= 500 or isinstance(error, _TIMEOUTS) or names & _PASSING:
        kind, advice = TransientStoreError, f"no good answer ({text})"
    elif isinstance(error, NotImplementedError):
        kind, advice = StoreError, f"the back end cannot do this ({text})"
    else:
        kind, advice = StoreError, text
    translated = kind(f"{where}: {advice}")
    translated.errno = getattr(error, "errno", None)
    if isinstance(translated, TransientStoreError) and not isinstance(error, (Replaced, ConnectionError)):
        translated.exhausted = exhausted
    return translated


def _status(error: Any) -> int | None:
    for holder in (error, getattr(error, "response", None)):
        for name in ("status_code", "status", "code"):
            try:
                return int(getattr(holder, name))
            except (AttributeError, TypeError, ValueError):
                continue
    return None
