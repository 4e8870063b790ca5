"""SIGINT and SIGTERM as exceptions, so that a command ends with one line and a status of its own.

Training has its own way with signals once there is something to save: `training/signals.py`.
"""

import atexit
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

from danube_jax.errors import EXIT_INTERRUPTED

SIGNALS = (signal.SIGTERM, signal.SIGINT)
RETRY_SECONDS = 0.05
JAX_FINDS_PLUGINS = "discover_pjrt_plugins"  # a function of jax's xla_bridge

_was_interrupted = False


class Interrupted(BaseException):
    """A signal asked the program to stop; its name is the text.

    Not an `Exception`, or whoever handles any error of a library would take it for one. Some
    libraries drop even others (a bare `except`, a C function that clears errors): one that dies
    before `handled` was called has the signal handled once more.
    """

    _lost = False

    def handled(self) -> None:
        """To be called by whoever catches it and does not raise it again."""
        self._lost = False

    def raised_by_signal(self) -> "Interrupted":
        """Itself, which from now on is not to be dropped."""
        self._lost = True
        return self

    def __del__(self) -> None:
        if self._lost:
            retry()


class KeyboardInterrupted(Interrupted, KeyboardInterrupt):
    """The same by SIGINT, which interactive programs may catch and go on from."""


def interrupted_by(number: int) -> Interrupted:
    """The exception that stands for a signal."""
    kind = KeyboardInterrupted if number == signal.SIGINT else Interrupted
    return kind(signal.Signals(number).name)


def raise_interrupted(
    number: int, frame: FrameType | None, again: Callable[[int, FrameType | None], None]
) -> None:
    """Raises what stands for a signal; to be called by its handler.

    While a module is imported, `again` is called a moment later instead: an exception that comes
    out of the initialisation of an extension module can bring the interpreter down. Likewise while
    JAX loads its plug-ins, since it takes any exception for a fault of theirs and goes on.
    """
    signal.signal(signal.SIGALRM, lambda _, frame: again(number, frame))
    if _is_importing(frame):
        retry()
    else:
        _note_interruption()
        raise interrupted_by(number).raised_by_signal()


def raise_keyboard_interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """As Python's own handler of SIGINT, for interactive programs, which go on from it."""
    _note_interruption()
    raise KeyboardInterrupt


def _note_interruption() -> None:
    global _was_interrupted
    _was_interrupted = True


def handled(error: BaseException) -> None:
    """Calls `Interrupted.handled` of what may be one."""
    if isinstance(error, Interrupted):
        error.handled()


def retry() -> None:
    """Has the last signal handled once more in a moment."""
    signal.setitimer(signal.ITIMER_REAL, RETRY_SECONDS)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith("<frozen importlib") or code.co_name == JAX_FINDS_PLUGINS:
            return True
        frame = frame.f_back
    return False


@contextlib.contextmanager
def exit_on_signal() -> Iterator[None]:
    """The first signal in the block ends the program with one line and status 75, once it has
    cleaned up; the second ends it at once. An ignored SIGINT (nohup, say) stays ignored.
    """
    received = []

    def handle(number: int, frame: FrameType | None) -> None:
        if received:
            os._exit(128 + number)
        received.append(number)
        stop(number, frame)

    def stop(number: int, frame: FrameType | None) -> None:
        raise_interrupted(number, frame, stop)

    previous = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in previous.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, handle)
    try:
        yield
    except Interrupted as interrupted:
        interrupted.handled()
        print(
            f"{interrupted}: stopped; nothing half-written stays, and the same command starts "
            "again or goes on",
            file=sys.stderr,
            flush=True,
        )
        raise SystemExit(EXIT_INTERRUPTED) from None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def leave(status: int) -> NoReturn:
    """Ends the program with a status.

    An exception that a signal raised amid JAX's work can leave it in a state in which the end of
    the interpreter is a segmentation fault. Where there was one, exit handlers run and streams are
    flushed, and libraries are not torn down.
    """
    if not _was_interrupted:
        raise SystemExit(status)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
