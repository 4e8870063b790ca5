"""Runs the project's commands in forks of a process that has imported what they need.

A command starts in milliseconds rather than seconds, which makes hundreds of damaged files
affordable. The server imports libraries and our modules, but neither a command's own module (its
flags belong to one command) nor a JAX backend; each fork then runs the command as `python -m` or a
script does, on its own file descriptors, and ends by a signal when its time is over.
"""

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PRELOAD = ("danube_jax.inference.loading", "danube_jax.command_line", "transformers")
TRACEBACK = "Traceback (most recent call last)"


@dataclasses.dataclass(frozen=True)
class Finished:
    """What a command did; `status` is None where it was ended because its time was over."""

    arguments: tuple[str, ...]
    status: int | None
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The lines of stderr that say what was wrong."""
        return [line for line in self.err.splitlines() if line.startswith("error: ")]

    def assert_refused(self, fragment: str) -> None:
        """It ended with status 2 and one clear line, which holds `fragment`."""
        assert self.status == 2, self
        assert TRACEBACK not in self.err
        assert len(self.errors) == 1, self.err
        assert fragment in self.errors[0], self.errors


def xla_flags(environment: Mapping[str, str], devices: int) -> str:
    """$XLA_FLAGS with that many virtual CPU devices."""
    option = "--xla_force_host_platform_device_count"
    flags = re.sub(rf"{option}=\d+", "", environment.get("XLA_FLAGS", ""))
    return f"{flags} {option}={devices}".strip()


class ForkServer:
    """Starts commands in forks, one at a time.

    Attributes:
      environment: of the commands.
    """

    def __init__(self, *preload: str, environment: Mapping[str, str] | None = None):
        """Imports `preload` (module names) beside `PRELOAD`, in a process of its own."""
        env = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200", **(environment or {})}
        self.environment, self._lock = env, threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, __file__, *PRELOAD, *preload],
            cwd=ROOT,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(
        self,
        program: str,
        *arguments: str,
        stdin: str | bytes = b"",
        seconds: float = 300.0,
        devices: int = 1,
        cwd: Path = ROOT,
    ) -> Finished:
        """Runs a module, or a script where `program` ends in .py, for at most `seconds`."""
        if isinstance(stdin, str):
            stdin = stdin.encode()
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "in").write_bytes(stdin)
            request = {"program": program, "arguments": arguments, "folder": folder}
            request["cwd"] = str(cwd)
            request["environment"] = {"XLA_FLAGS": xla_flags(self.environment, devices)}
            with self._lock:
                self._process.stdin.write(json.dumps(request | {"seconds": seconds}) + "\n")
                self._process.stdin.flush()
                reply = json.loads(self._process.stdout.readline())
            out, err = (
                (Path(folder) / name).read_text(encoding="utf-8", errors="replace")
                for name in ("out", "err")
            )
        return Finished((program, *arguments), reply["status"], out, err)

    def close(self) -> None:
        """Ends the server."""
        self._process.stdin.close()
        self._process.wait(30)


@contextlib.contextmanager
def fork_server(*preload: str, **environment: str) -> Iterator[ForkServer]:
    """A server for a block."""
    server = ForkServer(*preload, environment=environment)
    try:
        yield server
    finally:
        server.close()


def _serve(preload: list[str]) -> None:
    import gc
    import importlib
    import warnings

    warnings.filterwarnings("ignore", message="os.fork")
    for name in preload:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # or every collection in a fork would touch, and so copy, all that is imported
    replies = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)
            replies.close()
            _run(request)
        print(json.dumps({"status": _wait(child, request["seconds"])}), file=replies, flush=True)
    os._exit(0)  # to finalise all that was imported takes seconds


def _wait(child: int, seconds: float) -> int | None:
    end = time.monotonic() + seconds
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            with contextlib.suppress(ProcessLookupError):  # what it may have left behind
                os.killpg(child, signal.SIGKILL)
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.005)


def _run(request: dict) -> None:
    """Becomes the command; does not come back."""
    import atexit
    import runpy
    import traceback

    folder, program = Path(request["folder"]), request["program"]
    for number, (name, flags) in enumerate(
        (("in", os.O_RDONLY), ("out", os.O_WRONLY | os.O_CREAT), ("err", os.O_WRONLY | os.O_CREAT))
    ):
        descriptor = os.open(folder / name, flags, 0o600)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = open(number, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    sys.argv = [program, *request["arguments"]]
    sys.path[0] = str(Path(program).parent) if program.endswith(".py") else os.getcwd()
    status = 1
    try:
        if program.endswith(".py"):
            runpy.run_path(program, run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


if __name__ == "__main__":
    _serve(sys.argv[1:])
