"""What a signal raises, in the hands of code that is not ours."""

import gc
import os
import signal
import time

import pytest

from danube_jax.errors import EXIT_INTERRUPTED
from danube_jax.interruption import Interrupted, exit_on_signal

NUMBERS = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])


@NUMBERS
def test_one_that_is_dropped_comes_again(number, capsys):
    dropped = 0
    with pytest.raises(SystemExit) as ended, exit_on_signal():  # noqa: PT012
        for _ in range(3):
            try:
                if not dropped:
                    os.kill(os.getpid(), number)
                time.sleep(10)
            except:  # noqa: E722  (as libraries have it)
                dropped += 1
        time.sleep(10)
    assert ended.value.code == EXIT_INTERRUPTED
    assert dropped == 3
    assert capsys.readouterr().err.startswith(f"{signal.Signals(number).name}: stopped")


@NUMBERS
def test_one_that_is_on_its_way_or_was_handled_does_not(number, capsys):
    with pytest.raises(SystemExit), exit_on_signal():  # noqa: PT012
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        finally:
            time.sleep(0.2)  # what is cleaned up is not interrupted once more
    gc.collect()
    time.sleep(0.2)
    assert capsys.readouterr().err.count("stopped") == 1
    with exit_on_signal():
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        except Interrupted as interrupted:
            interrupted.handled()
        time.sleep(0.2)
