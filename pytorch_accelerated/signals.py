"""Signals that ask a run to stop or to save: noted when they come, acted upon when the run can."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from types import FrameType
from typing import Any

import psutil

_STOP = ("SIGTERM", "SIGINT")
_SAVE = ("SIGUSR1",)
WATCHED = tuple(getattr(signal, name) for name in (*_STOP, *_SAVE) if hasattr(signal, name))  # Windows has no SIGUSR1
"""The signals that a run handles in its own way."""


_watches: list[SignalWatch] = []  # those that are on; all share one handler
_previous: dict[int, Any] = {}  # the handlers that were there before ours
_pid = 0
_noting: set[int] = set()  # the signals whose former handler is being called
_SIGINTS_UNTIL_AT_ONCE = 3  # the second may be somebody's impatience, and must not harm a save


class SignalWatch:
    """Note SIGTERM, SIGINT and SIGUSR1, and the death of the launcher, while it is on.

    The third SIGINT raises KeyboardInterrupt, as a step may hang for ever.
    A handler that was there before is still called, and put back afterwards; what it raises is kept until the run can
    be left. A signal that was ignored before stays ignored. Child processes that are forked meanwhile keep the handling
    they would have had. Handlers that were set in C, as faulthandler does, are not seen.
    """

    def __init__(self) -> None:
        """Begin with nothing noted; nothing is watched yet."""
        self.stop_signal: str | None = None
        """Name of the first signal that asked to stop."""
        self.raised: BaseException | None = None
        """What a handler that was there before has raised."""
        self.is_heard = False
        """Whether a handler that was there before has been called for it."""
        self.wants_save = False
        """Whether a signal has asked to save; whoever does so sets it back."""
        self.num_sigints = 0
        """How often SIGINT came."""
        self.announces = False
        """Whether the first signal that asks to stop is answered with a line on standard error."""
        self._launcher: int | None = None

    def start(self, announces: bool = False) -> bool:
        """Begin to watch; return whether that is possible, which it is in the main thread only."""
        global _pid
        self.num_sigints, self.announces = 0, announces
        if os.getpid() != _pid:
            _watches.clear()  # of a parent that was in a run when it forked this process
        self.stop_signal, self.raised, self.wants_save = None, None, False
        self._launcher = _find_launcher()
        if threading.current_thread() is not threading.main_thread():
            return False
        if not _watches:
            _pid = os.getpid()
            for number in WATCHED:
                # None: a handler that was not set from Python, and could not be put back.
                if signal.getsignal(number) not in (signal.SIG_IGN, None, _note):
                    _previous[number] = signal.signal(number, _note)
        if self not in _watches:
            _watches.append(self)
        return True

    def stop(self) -> None:
        """Watch no longer; the last one puts the former handlers back, except where somebody has set another since."""
        if self in _watches:
            _watches.remove(self)
        if not _watches:
            for number in list(_previous):
                if signal.getsignal(number) == _note:
                    signal.signal(number, _previous.pop(number))

    def pass_on(self) -> None:
        """Let a signal that nobody has acted upon do what it does without a watch; call it after ``stop``."""
        name, self.stop_signal = self.stop_signal, None
        if self.raised is not None:
            raise self.raised
        if name is not None and not self.is_heard and not _watches:
            signal.raise_signal(getattr(signal, name))

    def find_reason_to_stop(self) -> str | None:
        """Return the name of the signal that asked to stop, or ``"launcher gone"``; None if there is no reason.

        `accelerate launch` with one process passes no signal on: it dies of it, and leaves its child behind.
        """
        if self.stop_signal is None and self._launcher is not None and os.getppid() != self._launcher:
            return "launcher gone"
        return self.stop_signal


def _note(number: int, frame: FrameType | None) -> None:
    if number in _noting:  # a handler that was set during an earlier run calls the one before it, which was this one
        return
    previous = _previous.get(number)
    # A child that was forked during the run; or a handler that was set during one and calls the one before it.
    if os.getpid() != _pid or not _watches:
        if callable(previous):
            previous(number, frame)
        elif previous != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        return
    name = signal.Signals(number).name
    raised: BaseException | None = None
    is_heard = callable(previous) and previous is not signal.default_int_handler
    _noting.add(number)
    try:
        if is_heard:
            previous(number, frame)  # type: ignore[misc]  # it is callable
    except BaseException as error:  # raised again by whoever leaves the run, once its state is saved
        raised = error
    finally:
        _noting.discard(number)
    for watch in _watches:
        watch.raised = watch.raised or raised
        if name in _SAVE and raised is None:
            watch.wants_save = True
        elif watch.stop_signal is None:
            watch.stop_signal = name if name in _STOP else "SIGTERM"
            watch.is_heard = is_heard
            if watch.announces:
                _announce(watch.stop_signal)
        watch.num_sigints += name == "SIGINT"
    if not is_heard and any(watch.num_sigints >= _SIGINTS_UNTIL_AT_ONCE for watch in _watches):
        raise KeyboardInterrupt("at once, without saving, as SIGINT came three times")


def _announce(name: str) -> None:
    more = " Twice more, and it stops at once, without saving." if name == "SIGINT" else ""
    line = f"\n{name}: the run saves its state after this update and stops.{more}\n"
    with suppress(OSError):  # nobody may be there to read it
        os.write(2, line.encode())  # not print, in which the signal may have come


def _find_launcher() -> int | None:
    """Return the parent's process id if it is `accelerate launch`, else None."""
    parent = os.getppid()
    try:
        command = psutil.Process(parent).cmdline()
    except psutil.Error:
        return None
    words = [os.path.basename(word) for word in command[:4]]
    is_module = "accelerate.commands.launch" in command or any("accelerate/commands/launch" in word for word in command)
    is_command = "accelerate-launch" in words or ("accelerate" in words and "launch" in words)
    return parent if is_module or is_command else None
