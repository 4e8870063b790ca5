"""Write a run's report: one HTML file that needs no network; several runs give a comparison.

Examples:
  python tools/report.py --workdir=runs/demo
  python tools/report.py --workdir=runs/demo --workdir=runs/other --output=comparison.html
"""

import os
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from danube_jax import command_line
from danube_jax.errors import UserError

COMPARISON = "comparison.html"

_WORKDIR = flags.DEFINE_multi_string("workdir", None, "Folder of a run; give several to compare.")
_OUTPUT = flags.DEFINE_string(
    "output", None, f"The file to write; default WORKDIR/report.html, or {COMPARISON} for several."
)


def main(argv: Sequence[str]) -> int:
    """Parses flags, writes the page and prints where it is; returns the exit status."""
    command_line.parse_flags(argv, __doc__, required=("workdir",))
    workdirs = [Path(name) for name in _WORKDIR.value]
    output = Path(_OUTPUT.value) if _OUTPUT.value else None
    if output is not None and output.is_dir():
        raise UserError(f"--output={output}: is a folder; expected the name of an HTML file")

    from danube_jax.report.page import write_comparison, write_report

    if len(workdirs) == 1:
        print(write_report(workdirs[0], output))
    else:
        print(write_comparison(workdirs, output or Path(COMPARISON)))
    return 0


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    command_line.run(main)
