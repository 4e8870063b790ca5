"""Train a model, or resume what a workdir holds.

Example:
  python -m danube_jax.train --config=configs/demo.py
  python -m danube_jax.train --config=configs/danube2.py --workdir=runs/danube2 \\
      --config.training.microbatch_tokens=16384
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from danube_jax import command_line
from danube_jax.errors import EXIT_INTERRUPTED, RunError
from danube_jax.interruption import Interrupted

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file in configs/; override values with --config.key=value."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; default runs/NAME.")
_COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "host:port of process 0, for a run of several processes."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes of the run.")
_HEARTBEAT = flags.DEFINE_integer(
    "heartbeat_seconds", 100, "How long a process may be silent before the others give up.", 5
)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "This process, from 0.")


def main(argv: Sequence[str]) -> int:
    """Parses flags, trains, and returns the exit status."""
    command_line.parse_flags(argv, __doc__, required=("config",))
    run = command_line.read_config(_CONFIG)
    workdir = Path(_WORKDIR.value or Path("runs") / run.name)

    from danube_jax.training.mesh import initialize_distributed
    from danube_jax.training.signals import StopRequest

    with StopRequest() as stop:
        try:
            several = initialize_distributed(
                _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, _HEARTBEAT.value
            )
            if not several:
                return _train(run, workdir, stop)
            from danube_jax.training.peers import name_lost_peers, one_of_several

            status = 0
            with one_of_several(), name_lost_peers():
                status = _train(run, workdir, stop)
            return status
        except Interrupted as interrupted:
            interrupted.handled()
            print(
                f"{interrupted}: stopped before the first step; the same command starts again",
                file=sys.stderr,
            )
            return EXIT_INTERRUPTED


def _train(run: Any, workdir: Path, stop: Any) -> int:
    from danube_jax.training.run import train

    try:
        status = train(run, workdir, stop)
    except RunError:
        _report(workdir)
        raise
    _report(workdir)
    return status


def _report(workdir: Path) -> None:
    """Writes the run's page where it stands now, whether the run is complete, stopped or failed."""
    import jax

    from danube_jax.report.page import report_at_end

    if jax.process_index() == 0:
        report_at_end(workdir)


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # JAX's own default leaves a quarter of a GPU unused, and Danube on one H100 needs more.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    command_line.run(main)
