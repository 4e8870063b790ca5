"""How one process of several ends when it fails, or when another one has died.

JAX's coordinator notices a silent process after `heartbeat_seconds` and ends the others from a
thread of its own, as does the loss of the coordinator itself, at once; a collective may fail before
that. A process that fails on its own must not wait for the others at JAX's exit barrier, which they
never reach.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

import jax

from danube_jax.errors import EXIT_INTERRUPTED, EXIT_RUN_FAILED, RunError, exit_on_user_error
from danube_jax.interruption import Interrupted

AGAIN = (
    "the last complete checkpoint is whole: end what is left of the run, and start all its "
    "processes again with the same command"
)
SILENT_END = (
    "error: this process was ended from outside, or by JAX because another process of the run is "
    f"gone (the lines above say which); {AGAIN}"
)
# Waits until the parent is gone, and speaks for one that went without a word.
_SPEAKER = """
import signal, sys
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
if not sys.stdin.buffer.read():
    print(sys.argv[1], file=sys.stderr)
"""


@contextlib.contextmanager
def one_of_several() -> Iterator[None]:
    """The work of one process: whatever ends it early is said, and ends it without waiting."""
    speaker = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _SPEAKER, SILENT_END],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    status = 0
    try:
        with exit_on_user_error():
            yield
    except SystemExit as error:
        status = error.code
    except Interrupted as interrupted:
        interrupted.handled()
        print(f"{interrupted}: stopped before the first step", file=sys.stderr)
        status = EXIT_INTERRUPTED
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = EXIT_RUN_FAILED
    with contextlib.suppress(OSError):
        speaker.communicate(b"said")
    if status:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


@contextlib.contextmanager
def name_lost_peers() -> Iterator[None]:
    """Turns what JAX raises when a collective breaks off into one line.

    Raises:
      RunError: a computation of all processes failed.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        text = " ".join(str(error).split())[:200]
        raise RunError(
            f"process {jax.process_index()} of {jax.process_count()}: a computation of all "
            f"processes failed, as when one of them has died ({text}); {AGAIN}"
        ) from error
