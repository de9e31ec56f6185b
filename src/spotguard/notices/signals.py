"""SIGTERM and SIGINT, heard even while the main thread sits in a long C call.

A Python signal handler runs in the main thread between two bytecodes, which can be many seconds after the signal. The C-level handler
writes the signal's number to the wakeup descriptor at once, and a thread that waits on its other end hears it within a millisecond.
The Python handler stays nearly empty: without one, the default action would end the process. It counts, and nudges that thread, for
somebody may have taken the wakeup descriptor from us (`asyncio.run` in the loop does, and leaves none behind).
"""

import contextlib
import ctypes
import logging
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

logger = logging.getLogger(__name__)

_LOOK_S = 10.0  # between two looks at a stop event that nobody woke us for
_NUDGE = b"\0"  # no signal has that number
_ACTION_BYTES = 1024  # more than a struct sigaction has anywhere; what is in it is none of our business
_sigaction = ctypes.PyDLL(None).sigaction
_installed: "weakref.WeakSet[SignalSource]" = weakref.WeakSet()


class SignalSource:
    """Turns a signal into a notice; the same one again, later than `repeat_s`, or Ctrl-C after any, ends the process at once.

    Another signal than the first is another notice: SLURM sends SIGUSR1 ahead of the end, and SIGTERM when it comes.

    Handlers that were there before are called after ours has recorded the signal, and are put back by `restore`; only Python's default
    SIGINT handler is not called, for a KeyboardInterrupt in the middle of an optimizer step would tear the state. For the same reason an
    exception that such a handler raises, SystemExit say, is held back. One that is not Python's, such as that of `faulthandler`, is put
    back, but not called. A forked child gets the previous handlers back at birth. What `spotguard.early` has recorded is taken over.

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
        self._native: dict[int, Any] = {}
        self._chained = dict(previous or {})
        self._previous_fd = self._forward_fd = -1
        self._runs = dict.fromkeys(signals, 0)  # of the handler
        self._first: dict[int, float] = {}  # when each was first heard, by the thread
        self._notices: dict[int, PreemptionNotice] = {}
        self._held: dict[int, str] = {}  # exceptions of the handlers before ours
        self._told: set[int] = set()
        self._restored: list[int] = []

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
        if self._previous_fd != -1:
            with contextlib.suppress(OSError):  # of our own: the number of theirs is another file's once they close it
                self._forward_fd = os.dup(self._previous_fd)
        for number in self._signals:
            if number != signal.SIGTERM and signal.getsignal(number) is signal.SIG_IGN:
                continue
            native = ctypes.create_string_buffer(_ACTION_BYTES)
            _sigaction(number, None, native)
            self._previous[number] = signal.signal(number, self._handle)
            if not callable(self._previous[number]):  # what the kernel has may be more than Python knows of
                self._native[number] = native
        _installed.add(self)
        early = sys.modules.get("spotguard.early")  # to import it is to use it
        if early is not None:
            self._take_over(early.hand_over(), early.before)

    def restore(self) -> None:
        """Put back what was there before, except where somebody has set a handler of their own since."""
        _installed.discard(self)
        self._restored = self._put_back()
        ours, now = self._writer.fileno(), signal.set_wakeup_fd(-1)
        with contextlib.suppress(OSError, ValueError):  # its owner has closed it meanwhile: then there is none
            if now != ours:
                signal.set_wakeup_fd(now)
            elif self._forward_fd != -1 and os.path.sameopenfile(self._previous_fd, self._forward_fd):
                signal.set_wakeup_fd(self._previous_fd)
        for number in self._read():  # that came while the handlers were put back
            self._notice(number)
        self._writer.close()
        self._reader.close()
        if self._forward_fd != -1:
            os.close(self._forward_fd)
            self._forward_fd = -1

    def hand_on(self) -> PreemptionNotice | None:
        """After `restore`, where nobody has acted on what was heard: have it done by what was there before.

        Returns:
            What by default ends the process; that is left to the caller.
        """
        fatal = None
        for number in [number for number in self._notices if number in self._restored]:
            previous = self._previous[number]
            chained = self._chained.get(number, previous)
            if callable(chained) and chained is not signal.default_int_handler and number not in self._held:
                continue  # it has been called, and has returned
            if previous is signal.SIG_DFL:
                fatal = fatal or self._notices[number]
            else:
                os.kill(os.getpid(), number)
        return fatal

    def watch(self, emit: Callable[[PreemptionNotice], None], stop: threading.Event) -> None:
        """See `NoticeSource.watch`."""
        waiter = select.poll()  # select() knows no descriptors above 1023
        waiter.register(self._reader, select.POLLIN)
        counted, owed = dict.fromkeys(self._signals, 0), dict.fromkeys(self._signals, 0)
        while not stop.is_set():
            waiter.poll(_LOOK_S * 1000)
            runs = dict(self._runs)  # before the bytes: a handler that has run is not ahead of its byte
            for number in self._read():
                owed[signal.Signals(number)] += 1
                self._arrived(signal.Signals(number), emit)
            for number, count in runs.items():
                new, counted[number] = count - counted[number], count
                known = min(new, owed[number])
                owed[number] -= known
                if new > known:  # its byte went to whoever has the wakeup descriptor now
                    self._arrived(number, emit)
            self._tell_of_held()

    def recorded(self) -> PreemptionNotice | None:
        """The first signal that has come, as a notice; None when none has."""
        return next(iter(self._notices.values()), None)

    def wake(self) -> None:
        """Make `watch` look at its stop event now."""
        with contextlib.suppress(OSError):  # full: then there is enough to read; closed: then nobody reads
            self._writer.send(_NUDGE)

    def _take_over(self, number: int | None, before: Callable[[Any], Any]) -> None:
        for handlers in (self._previous, self._chained):
            handlers.update({number: before(handler) for number, handler in handlers.items()})
        if number is not None:
            self._notice(number)
            self._runs[signal.Signals(number)] += 1
            self.wake()

    def _read(self) -> bytes:
        """Numbers of signals, passed on to whoever had the wakeup descriptor before."""
        try:
            numbers = self._reader.recv(4096).replace(_NUDGE, b"")
        except BlockingIOError:
            return b""
        if numbers and self._forward_fd != -1:
            # Full or closed: its owner sees to that, as with a byte from the C handler.
            with contextlib.suppress(OSError):
                os.write(self._forward_fd, numbers)
        return bytes(number for number in numbers if number in self._previous)

    def _arrived(self, number: signal.Signals, emit: Callable[[PreemptionNotice], None]) -> None:
        now = time.monotonic()
        counts = [at for other, at in self._first.items() if other == number or number == signal.SIGINT]
        first = min(counts, default=None)
        if first is None:
            self._first[number] = now
            emit(self._notice(number))
        elif now - first > self._repeat_s:
            os.write(
                2, f"spotguard: second {number.name}, leaving at once; the last committed checkpoint stands\n".encode()
            )
            self._leave(128 + number)

    def _notice(self, number: int) -> PreemptionNotice:
        """One for each signal, made when it is first heard."""
        name = signal.Signals(number).name
        return self._notices.setdefault(number, PreemptionNotice(source=self.name, kind="signal", detail=name, id=name))

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number not in self._notices:
            self._notice(number)
        self._runs[signal.Signals(number)] += 1
        self._on_record()
        self.wake()
        previous = self._chained.get(number, self._previous.get(number))
        if callable(previous) and previous is not signal.default_int_handler:
            try:
                previous(number, frame)
            except BaseException as error:  # noqa: BLE001 - we are in the middle of a step
                self._held[number] = type(error).__name__

    def _tell_of_held(self) -> None:
        for number in [number for number in self._held if number not in self._told]:
            self._told.add(number)
            logger.warning(
                "the handler of %s that was there before has raised %s; that is held back, so that no step is torn",
                signal.Signals(number).name,
                self._held[number],
            )

    def _put_back(self) -> list[int]:
        ours = [number for number in self._previous if signal.getsignal(number) == self._handle]
        for number in ours:
            previous = self._previous[number]
            signal.signal(number, signal.SIG_DFL if previous is None else previous)
            if number in self._native:
                _sigaction(number, self._native[number], None)
        return ours

    def _reset_in_child(self) -> None:
        self._put_back()
        self._previous = {}
        now = signal.set_wakeup_fd(-1)
        if now != self._writer.fileno():
            signal.set_wakeup_fd(now)


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
