"""Work beside training: one job at a time, and no error is lost."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable


class Background:
    """Runs jobs in a thread, at most one at a time: who hands over work too fast waits, so memory does not grow.

    The error of a job is raised, once, by the next `submit` or `wait`; where none follows, Python prints it as it exits.

    >>> background, done = Background("example"), []
    >>> background.submit(lambda: done.append(1))
    >>> background.wait()
    >>> done
    [1]
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Begin `job` when the one before is over. Raises the error of that one instead."""
        self.wait()

        def run() -> None:
            try:
                job()
            except BaseException as error:
                self._error = error
                # Held here, it outlives its owner; threads are joined before, so the last job is over by then.
                atexit.register(self.raise_error)

        self._thread = threading.Thread(target=run, name=self._name)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether a job is under way."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Wait for the job under way. Raises its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.raise_error()

    def raise_error(self) -> None:
        """Raise the error of a job that is over, without waiting for one that is not."""
        if not self.busy and (error := self._error) is not None:
            self._error = None
            atexit.unregister(self.raise_error)
            raise error
