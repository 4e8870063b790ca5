"""Runs the project's commands in processes of their own, and reads what they leave."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from fork_commands import ROOT, ForkServer, xla_flags

TIMEOUT = 400.0  # seconds
# What a command imports beside `fork_commands.PRELOAD`, where it is installed; those that are not
# named are taken for training.
PRELOAD = {
    "danube_jax.evaluate": ("danube_jax.evaluation.harness", "lm_eval.evaluator", "lm_eval.tasks"),
    "danube_jax.train": (
        "danube_jax.training.run",
        "danube_jax.training.tuning",
        "danube_jax.interop.import_hf",
        "danube_jax.interop.export_hf",
    ),
}
_servers: dict[tuple[str, ...], ForkServer] = {}


def command(
    *arguments: str,
    module: str = "danube_jax.train",
    devices: int = 1,
    environment: Mapping[str, str] | None = None,
    fresh: bool = False,
    stdin: str = "",
    cwd: Path = ROOT,
) -> subprocess.CompletedProcess:
    """Runs ``python -m MODULE``, or a script where `module` ends in .py.

    Args:
      devices: virtual CPU devices.
      environment: more of it; the command gets an interpreter of its own.
      fresh: an interpreter of its own, rather than a fork of one that has the imports behind it.
      stdin: what it reads there.
      cwd: the folder that it runs in.
    """
    if fresh or environment:
        process = start_command(
            *arguments, module=module, devices=devices, environment=environment, cwd=cwd
        )
        out, err = process.communicate(stdin, timeout=TIMEOUT)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)
    preload = PRELOAD.get(module, PRELOAD["danube_jax.train"])
    preload = tuple(name for name in preload if importlib.util.find_spec(name.split(".")[0]))
    if preload not in _servers:
        # It ends when this process does, which holds the other end of its stdin.
        _servers[preload] = ForkServer(
            *preload, environment={"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        )
    done = _servers[preload].run(
        module, *arguments, seconds=TIMEOUT, devices=devices, stdin=stdin, cwd=cwd
    )
    if done.status is None:
        raise subprocess.TimeoutExpired([module, *arguments], TIMEOUT, done.out, done.err)
    return subprocess.CompletedProcess([module, *arguments], done.status, done.out, done.err)


def start_command(
    *arguments: str,
    module: str = "danube_jax.train",
    devices: int = 1,
    environment: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
) -> subprocess.Popen:
    """Starts a command in an interpreter of its own."""
    program = [module] if module.endswith(".py") else ["-m", module]
    env = os.environ | {"PYTHONPATH": str(ROOT), **(environment or {})}
    env["XLA_FLAGS"] = xla_flags(env, devices)
    return subprocess.Popen(
        [sys.executable, *program, *arguments],
        cwd=cwd,
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def read_rows(workdir: Path, kind: str) -> list[dict]:
    """The rows of one kind in a run's metrics.jsonl."""
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["kind"] == kind]


def read_unsealed(path: Path) -> dict:
    """A JSON file of ours without its seal, as who edits it on purpose leaves it."""
    content = json.loads(path.read_text())
    return {key: value for key, value in content.items() if key not in ("sealed", "seal")}
