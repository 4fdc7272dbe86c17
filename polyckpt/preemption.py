"""Signals that ask a process to end, kept until training has come to a place where it can be saved."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable
from types import FrameType
from typing import Any

from polyckpt.errors import RunError


class Preemption:
    """Notes the first of `signals` that arrives, passes each on to the handler there was, and puts that back in `restore`.

    Python's own handlers are not passed on to, since they would end the process in mid-step. After the first SIGINT the
    earlier handler is in force again: who presses Ctrl-C a second time does not want to wait.
    """

    def __init__(self, signals: Iterable[signal.Signals]) -> None:
        """Raises RunError outside the main thread, the only one that Python lets handle signals."""
        if threading.current_thread() is not threading.main_thread():
            raise RunError("signals can be handled in the main thread alone: make the manager there, or pass preemption=False")
        self.signal: signal.Signals | None = None
        self._earlier: dict[signal.Signals, Any] = {}
        self._over = False
        self._pid = os.getpid()
        try:
            for each in map(signal.Signals, signals):
                self._earlier[each] = signal.signal(each, self._handle)
        except OSError as error:
            self.restore()
            raise RunError(f"{each.name} cannot be handled: {error.strerror}") from error

    @property
    def exit_code(self) -> int:
        """The code of a process that a signal ended, as shells have it."""
        return 128 + (self.signal or 0)

    def restore(self) -> None:
        """Put the earlier handlers back, where nobody has set another one since; one that was set passes over this one."""
        self._over = True
        for each in self._earlier:
            self._put_back(each)

    def _put_back(self, each: signal.Signals) -> None:
        if threading.current_thread() is threading.main_thread() and signal.getsignal(each) == self._handle:
            signal.signal(each, self._before(each))

    def _before(self, each: signal.Signals) -> Any:
        """The handler there was, but for those of others that are over meanwhile."""
        earlier = self._earlier[each]
        owner = getattr(earlier, "__self__", None)
        if isinstance(owner, Preemption) and owner._over:
            return owner._before(each)
        return signal.SIG_DFL if earlier is None else earlier

    def _handle(self, number: int, frame: FrameType | None) -> None:
        each = signal.Signals(number)
        earlier = self._before(each)
        if (self._over or os.getpid() != self._pid) and signal.getsignal(each) == self._handle:
            # Nothing is saved any more, or not by a forked worker: what ends a process must go on doing so.
            self._put_back(each)
            os.kill(os.getpid(), number)
            return
        if self.signal is None:
            self.signal = each
        if each is signal.SIGINT:
            self._put_back(each)
        if callable(earlier) and earlier is not signal.default_int_handler:
            earlier(number, frame)
