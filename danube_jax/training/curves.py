"""Curves and texts for TensorBoard, written by the thread that has them.

tensorboardX's own SummaryWriter hands them to a thread of its own. A full disk ends that thread,
and whoever writes on waits for it for ever.
"""

import contextlib
import time
from pathlib import Path

from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

FLUSH_SECONDS = 10.0


class CurveWriter:
    """An event file in a folder; every method raises OSError where the disk does not take it."""

    def __init__(self, folder: Path, purge_step: int):
        """Begins a file; TensorBoard hides what earlier files say of `purge_step` and later."""
        folder.mkdir(parents=True, exist_ok=True)
        self._file = EventsWriter(str(folder / "events"))
        self._add(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))
        self.flush()

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """One value of a curve."""
        self._add(Event(step=step, summary=summary.scalar(tag, value)))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def add_text(self, tag: str, text: str, step: int) -> None:
        """One text."""
        self._add(Event(step=step, summary=summary.text(tag, text)))
        self.flush()

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        self._file.write_event(event)

    def flush(self) -> None:
        """Makes what was added readable."""
        self._file.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Writes the rest."""
        self._file.close()

    def abandon(self) -> None:
        """Closes the file, whether or not the disk takes the rest."""
        with contextlib.suppress(OSError):
            self._file.close()
