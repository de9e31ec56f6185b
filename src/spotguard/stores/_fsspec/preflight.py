"""What a run will need of a back end, tried out with a throwaway object before it is needed."""

import secrets
import time
from collections.abc import Callable
from typing import Protocol, TypeVar

from spotguard.errors import ConfigError, ObjectExistsError, StoreAccessError, StoreError
from spotguard.stores._fsspec.drivers import Body, Driver
from spotguard.stores._fsspec.errors import NoPlaceError

__all__ = ["Translate", "preflight"]

_T = TypeVar("_T")
_PROBE = "probe-"
_OLD_S = 86_400.0  # after which the start that wrote a probe is dead, even by a clock that is wrong
_BODY = b"spotguard finds out what may be done here\n"


class Translate(Protocol):
    """Says in our words what a back end has said."""

    def __call__(self, error: Exception, *, exclusive: bool = False, creating: bool = False) -> StoreError: ...


def preflight(driver: Driver, uri: str, root: str, translate: Translate, *, alone: bool, advice: str) -> None:
    """Create, create again, read back, list and delete.

    Args:
        driver: The back end.
        uri: Of the store, for messages.
        root: Its path in the back end.
        translate: For what it raises.
        alone: It need not keep two writers apart.
        advice: What an account needs there, for the message.

    Raises:
        StoreAccessError: The place does not exist, or these things are not allowed.
        ConfigError: What answers there accepts a second exclusive create of the same object.
        StoreError: What was written is not what is read and listed.
    """
    path, denied = f"{root}/{_PROBE}{int(time.time()):010x}-{secrets.token_hex(8)}", dict[str, StoreAccessError]()

    def attempt(verb: str, work: Callable[[], _T]) -> _T | None:
        creating = verb == "create"
        try:
            return work()
        except Exception as error:
            translated = translate(error, exclusive=creating, creating=creating)
            if not isinstance(translated, StoreAccessError) or isinstance(translated, NoPlaceError):
                raise translated from error
            denied.setdefault(verb, translated)
            return None

    def create(token: str) -> bool:
        body = Body()
        body.append(memoryview(_BODY), None)
        try:
            attempt("create", lambda: driver.put(path, body, exclusive=True, token=token, deadline=None))
        except ObjectExistsError:  # of the first: an answer was lost and a retry was told so; nobody else has this name
            return False
        return not denied

    create("1")
    again, data, created = False, None, not denied
    if created:
        again = driver.probe and create("2")  # some emulators and gateways accept the condition and ignore it
        denied.clear()  # not to be allowed to replace it is as good
        data = attempt("read", lambda: driver.read(path, 0, None, None))
    probes = [name for name, _ in attempt("list", lambda: list(driver.walk(f"{root}/{_PROBE}"))) or ()]
    if created:
        attempt("delete", lambda: driver.remove([path, *filter(_is_old, probes)]))
    if denied:
        raise StoreAccessError(
            f"{next(iter(denied.values()))}\nWhat is not allowed there: {', '.join(denied)}. "
            f"A run needs to create, read, list and delete objects{advice}"
        )
    if again and not alone:
        raise ConfigError(
            f"{uri}: what answers there accepts a second exclusive create of the same object, so it would not keep two writers "
            "apart. Use another server, or, if never two processes write there at the same time, set single_writer=True"
        )
    if data != _BODY or path not in probes:
        raise StoreError(f"{uri}: what was written there is not what is read and listed a moment later")


def _is_old(path: str) -> bool:
    written, _, _ = path.rpartition(f"/{_PROBE}")[2].partition("-")
    try:
        return time.time() - int(written, 16) > _OLD_S
    except ValueError:
        return False  # somebody else's
