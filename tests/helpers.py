"""Runs the project's commands in processes of their own, and reads what they leave."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def command(
    *arguments: str,
    module: str = "danube_jax.train",
    devices: int = 1,
    environment: Mapping[str, str] | None = None,
    start: bool = False,
):
    """Runs (or starts) ``python -m MODULE``, or a script where `module` ends in .py."""
    program = [module] if module.endswith(".py") else ["-m", module]
    env = os.environ | {"PYTHONPATH": str(ROOT), **(environment or {})}
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", env["XLA_FLAGS"])
    env["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={devices}".strip()
    popen = subprocess.Popen(
        [sys.executable, *program, *arguments],
        cwd=ROOT,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if start:
        return popen
    out, err = popen.communicate(timeout=400)
    return subprocess.CompletedProcess(popen.args, popen.returncode, out, err)


def read_rows(workdir: Path, kind: str) -> list[dict]:
    """The rows of one kind in a run's metrics.jsonl."""
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["kind"] == kind]


def read_unsealed(path: Path) -> dict:
    """A JSON file of ours without its seal, as who edits it on purpose leaves it."""
    content = json.loads(path.read_text())
    return {key: value for key, value in content.items() if key not in ("sealed", "seal")}
