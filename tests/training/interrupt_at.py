"""Runs the training command and sends this process a signal when a step has been logged.

Usage: interrupt_at.py STEP SIGNAL [the training command's own arguments]
"""

import os
import signal
import sys

from danube_jax import command_line, train
from danube_jax.training.metrics import MetricsWriter

step, number = int(sys.argv.pop(1)), signal.Signals[sys.argv.pop(1)]
write = MetricsWriter.write


def write_and_interrupt(self, row):
    """Logs the row, then sends the signal where it is the chosen step's."""
    write(self, row)
    if row["kind"] == "train" and row["step"] == step:
        os.kill(os.getpid(), number)


MetricsWriter.write = write_and_interrupt
command_line.run(train.main)
