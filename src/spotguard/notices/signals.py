"""SIGTERM and SIGINT, heard even while the main thread sits in a long C call.

A Python signal handler runs in the main thread between two bytecodes, which can be many seconds after the signal. The C-level handler
writes the signal's number to the wakeup descriptor at once, and a thread that waits on its other end hears it within a millisecond.
The Python handler stays nearly empty: without one, the default action would end the process.
"""

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any, NoReturn

from spotguard.errors import ConfigError
from spotguard.notices.base import PreemptionNotice

__all__ = ["SignalSource"]

_POLL = 0.5  # seconds; only for a wakeup descriptor that somebody took from us (asyncio.run in the loop, say)
_WAKE = b"\0"  # no signal has that number
_installed: "weakref.WeakSet[SignalSource]" = weakref.WeakSet()


class SignalSource:
    """Turns the first signal into a notice; a second one, later than `repeat_s`, ends the process at once.

    Handlers that were there before are called after ours has recorded the signal, and are put back by `restore`; only Python's default
    SIGINT handler is not called, for a KeyboardInterrupt in the middle of an optimizer step would tear the state. A forked child gets the
    previous handlers back at birth. What `spotguard.early` has recorded is taken over.

    Args:
        signals: What to hear. A signal that the parent had set to be ignored (``nohup``) stays ignored, SIGTERM excepted.
        repeat_s: Launchers often deliver one stop twice; repeats within so many seconds are the same notice.
        on_record: Called by the handler itself, in the main thread, to set a flag and nothing else: the loop then sees the signal at its
            next boundary even if the watching thread has not had its turn at the interpreter.
        leave: How to end the process at once, given the exit status.
        previous: Handlers to call after ours, by signal, in place of those that are found; None for one calls none.
    """

    name = "signal"

    def __init__(
        self,
        signals: tuple[signal.Signals, ...] = (signal.SIGTERM, signal.SIGINT),
        *,
        repeat_s: float = 1.0,
        on_record: Callable[[], None] = lambda: None,
        leave: Callable[[int], NoReturn] = os._exit,
        previous: Mapping[int, Any] | None = None,
    ) -> None:
        self._signals = signals
        self._repeat_s = repeat_s
        self._on_record, self._leave = on_record, leave
        self._previous: dict[int, Any] = {}
        self._chained = dict(previous or {})
        self._previous_fd = -1
        self._recorded: int | None = None
        self._first: float | None = None

    def install(self) -> None:
        """Set the handlers.

        Raises:
            ConfigError: Not in the main thread, the only one where Python lets handlers be set.
        """
        if threading.current_thread() is not threading.main_thread():
            raise ConfigError(
                "SpotGuard must be entered in the main thread: Python sets signal handlers nowhere else. "
                "Move the training loop there"
            )
        self._reader, self._writer = socket.socketpair()
        self._reader.settimeout(0)
        self._writer.settimeout(0)
        self._previous_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in self._signals:
            if number != signal.SIGTERM and signal.getsignal(number) is signal.SIG_IGN:
                continue
            self._previous[number] = signal.signal(number, self._handle)
        _installed.add(self)
        early = sys.modules.get("spotguard.early")  # to import it is to use it
        if early is not None:
            self._recorded = early.hand_over() or self._recorded
            for handlers in (self._previous, self._chained):
                handlers.update({number: early.before(handler) for number, handler in handlers.items()})

    def restore(self) -> None:
        """Put back what was there before, except where somebody has set a handler of their own since."""
        _installed.discard(self)
        for number, previous in self._previous.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, signal.SIG_DFL if previous is None else previous)
        self._previous.clear()
        ours, now = self._writer.fileno(), signal.set_wakeup_fd(-1)
        with contextlib.suppress(OSError, ValueError):  # its owner has closed it meanwhile: then there is none
            signal.set_wakeup_fd(self._previous_fd if now == ours else now)
        self._writer.close()
        self._reader.close()

    def watch(self, emit: Callable[[PreemptionNotice], None], stop: threading.Event) -> None:
        """See `NoticeSource.watch`."""
        while not stop.is_set():
            ready, _, _ = select.select([self._reader], [], [], _POLL)
            numbers = self._reader.recv(4096).replace(_WAKE, b"") if ready else b""
            if numbers and self._previous_fd != -1:
                self._forward(numbers)
            if not numbers and self._recorded is not None and self._first is None:
                numbers = bytes([self._recorded])
            for number in numbers:
                if number in self._previous:
                    self._arrived(signal.Signals(number), emit)

    def recorded(self) -> PreemptionNotice | None:
        """What the handler has recorded, as a notice; None when no signal has come."""
        number = self._recorded
        return None if number is None else self._notice(signal.Signals(number))

    def wake(self) -> None:
        """Make `watch` look at its stop event now."""
        with contextlib.suppress(OSError):  # full: then there is enough to read
            self._writer.send(_WAKE)

    def _arrived(self, number: signal.Signals, emit: Callable[[PreemptionNotice], None]) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = now
            emit(self._notice(number))
        elif now - self._first > self._repeat_s:
            os.write(
                2, f"spotguard: second {number.name}, leaving at once; the last committed checkpoint stands\n".encode()
            )
            self._leave(128 + number)

    def _notice(self, number: signal.Signals) -> PreemptionNotice:
        return PreemptionNotice(source=self.name, kind="signal", detail=number.name)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._recorded = number
        self._on_record()
        previous = self._chained.get(number, self._previous.get(number))
        if callable(previous) and previous is not signal.default_int_handler:
            previous(number, frame)

    def _forward(self, numbers: bytes) -> None:
        try:
            os.write(self._previous_fd, numbers)
        except OSError:  # full or closed: its owner sees to that, as with a byte from the C handler
            return

    def _reset_in_child(self) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, signal.SIG_DFL if previous is None else previous)
        self._previous = {}
        signal.set_wakeup_fd(-1)


# A signal that a forked child gets before it has its previous handlers back would be recorded by ours and forgotten: the interpreter clears
# what is pending in a new child. So it is held back until then, and comes with the action that the child has for it.


def _before_fork() -> None:
    numbers = {number for source in _installed for number in source._previous}  # noqa: SLF001 - this module's own
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, numbers) if numbers else None


def _after_fork_in_parent() -> None:
    if (mask := getattr(_forking, "mask", None)) is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _after_fork_in_child() -> None:
    for source in list(_installed):
        source._reset_in_child()  # noqa: SLF001
        _installed.discard(source)
    _after_fork_in_parent()


_forking = threading.local()
os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
