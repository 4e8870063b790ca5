"""Exceptions meant for the user, exit codes, and how entry points show them."""

import contextlib
import errno
import re
import sys
from collections.abc import Iterator

DISK_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ESTALE,
)
NO_TEMPORARY = "No usable temporary directory"  # Python's words where all of them are full
EXIT_RUN_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: saved, run the same command again


# Control characters but newline and tab, and those that turn the direction of writing.
_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """`text` with the characters that could steer a terminal spelt out; lines stay lines."""
    return _STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class UserError(Exception):
    """Bad input: the message is one line that says what is wrong, where, and how to mend it.

    Entry points print it as ``error: ...`` and exit with status 2, without a traceback.
    """


class RunError(Exception):
    """A run that cannot go on for a reason of its own (it diverged, say); one line, status 1."""


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turns a `UserError` raised inside the block into one line on stderr and exit status 2.

    A `RunError` likewise, with exit status 1; a full or unwritable disk is a user's to mend.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS and NO_TEMPORARY not in str(error):
            raise
        print(
            f"error: {error.filename or 'the disk'}: {error.strerror}; make room or choose another "
            "folder and run the same command again",
            file=sys.stderr,
            flush=True,
        )
        raise SystemExit(EXIT_USER_ERROR) from None
    except (UserError, RunError) as error:
        print(f"error: {printable(' '.join(str(error).split()))}", file=sys.stderr, flush=True)
        status = EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_RUN_FAILED
        raise SystemExit(status) from None
