"""SIGTERM and SIGINT: the first asks the run to save and stop, the second ends it at once."""

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any

from danube_jax.console import warn
from danube_jax.interruption import SIGNALS, raise_interrupted


class StopRequest:
    """Context in which signals set `requested` instead of ending the process.

    Until `defer` is called there is nothing to save, and the first signal raises `Interrupted`.
    """

    def __init__(self) -> None:
        self.requested = False
        self._deferred = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def defer(self) -> None:
        """From now on the first signal only sets `requested`."""
        self._deferred = True

    @property
    def deferred(self) -> bool:
        """Whether the first signal only sets `requested`."""
        return self._deferred

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """A block that a first signal leaves by `Interrupted`: long, and as well done later."""
        deferred, self._deferred = self._deferred, False
        try:
            yield
        finally:
            self._deferred = deferred

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            os._exit(128 + number)
        self.requested = True
        self._react(number, frame)

    def _react(self, number: int, frame: FrameType | None) -> None:
        if not self._deferred:
            raise_interrupted(number, frame, self._react)
            return
        name = signal.Signals(number).name
        warn(f"{name}: saving after this step, then stopping; once more ends at once")
