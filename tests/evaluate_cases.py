"""Calls `danube_jax.evaluate` many times in one process, as the command would be called.

Reads a JSON list of argument lists on standard input; writes a list of [status, stderr].
"""

import contextlib
import io
import json
import sys


def main() -> None:
    """Runs the cases."""
    from absl.testing import flagsaver

    from danube_jax import console, evaluate
    from danube_jax.errors import exit_on_user_error

    out = []
    for arguments in json.load(sys.stdin):
        shown = io.StringIO()
        console.console.file = shown
        status = 0
        with contextlib.redirect_stderr(shown), flagsaver.flagsaver():
            try:
                with exit_on_user_error():
                    status = evaluate.main(["evaluate", *arguments])
            except SystemExit as stop:
                status = stop.code
        out.append([status, shown.getvalue()])
    json.dump(out, sys.stdout)


if __name__ == "__main__":
    main()
