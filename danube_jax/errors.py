"""The one exception that a user's mistake raises, and how entry points show it."""

import contextlib
import sys
from collections.abc import Iterator

EXIT_USER_ERROR = 2


class UserError(Exception):
    """Bad input: the message is one line that says what is wrong, where, and how to mend it.

    Entry points print it as ``error: ...`` and exit with status 2, without a traceback.
    """


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turns a `UserError` raised inside the block into one line on stderr and exit status 2."""
    try:
        yield
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        raise SystemExit(EXIT_USER_ERROR) from None
