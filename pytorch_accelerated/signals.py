"""Signals that ask a run to stop or to save: noted when they come, acted upon when the run can."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

import psutil

_STOP = ("SIGTERM", "SIGINT")
_SAVE = ("SIGUSR1",)  # Windows has none


class SignalWatch:
    """Note SIGTERM, SIGINT and SIGUSR1, and the death of the launcher, while it is on.

    A handler that was there before is still called, and put back afterwards. A signal that was ignored before stays
    ignored. Child processes that are forked meanwhile keep the handling they would have had.
    """

    def __init__(self) -> None:
        """Begin with nothing noted; nothing is watched yet."""
        self.stop_signal: str | None = None
        """Name of the first signal that asked to stop."""
        self.wants_save = False
        """Whether a signal has asked to save; whoever does so sets it back."""
        self._previous: dict[int, Any] = {}
        self._pid = 0
        self._is_on = False
        self._launcher: int | None = None

    def start(self) -> bool:
        """Begin to watch; return whether that is possible, which it is in the main thread only."""
        self.stop_signal, self.wants_save = None, False
        self._pid, self._is_on = os.getpid(), True
        self._launcher = _find_launcher()
        if threading.current_thread() is not threading.main_thread():
            return False
        for name in (*_STOP, *_SAVE):
            number = getattr(signal, name, None)
            # None: a handler that was not set from Python, and could not be put back.
            if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):
                self._previous[number] = signal.signal(number, self._note)
        return True

    def stop(self) -> None:
        """Put the former handlers back; where somebody has set another since, let it be."""
        self._is_on = False
        for number in list(self._previous):
            if signal.getsignal(number) == self._note:
                signal.signal(number, self._previous.pop(number))

    def find_reason_to_stop(self) -> str | None:
        """Return the name of the signal that asked to stop, or ``"launcher gone"``; None if there is no reason.

        `accelerate launch` with one process passes no signal on: it dies of it, and leaves its child behind.
        """
        if self.stop_signal is None and self._launcher is not None and os.getppid() != self._launcher:
            return "launcher gone"
        return self.stop_signal

    def _note(self, number: int, frame: FrameType | None) -> None:
        previous = self._previous.get(number)
        # A child that was forked during the run; or somebody who came after us has put us back in his turn.
        if os.getpid() != self._pid or not self._is_on:
            signal.signal(number, signal.SIG_DFL if previous is None else previous)
            os.kill(os.getpid(), number)
            return
        name = signal.Signals(number).name
        if name in _SAVE:
            self.wants_save = True
        elif self.stop_signal is None:
            self.stop_signal = name
        if callable(previous) and previous is not signal.default_int_handler:
            previous(number, frame)


def _find_launcher() -> int | None:
    """Return the parent's process id if it is `accelerate launch`, else None."""
    parent = os.getppid()
    try:
        command = psutil.Process(parent).cmdline()
    except psutil.Error:
        return None
    words = [os.path.basename(word) for word in command[:4]]
    is_launcher = "accelerate-launch" in words or "accelerate.commands.launch" in words or "launch.py" in words
    return parent if is_launcher or ("accelerate" in words and "launch" in words) else None
