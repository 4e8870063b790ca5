"""SIGTERM and SIGINT: the first asks the run to save and stop, the second ends it at once."""

import os
import signal
from types import FrameType
from typing import Any

from danube_jax.console import warn

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(Exception):
    """A signal arrived before there was anything to save."""


class StopRequest:
    """Context in which signals set `requested` instead of ending the process.

    Until `defer` is called there is no training state, and the first signal raises `Interrupted`.
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

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.requested:
            os._exit(128 + number)
        self.requested = True
        name = signal.Signals(number).name
        if not self._deferred:
            raise Interrupted(name)
        warn(f"{name}: saving after this step, then stopping; once more ends at once")
