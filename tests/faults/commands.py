"""Starts the project's commands for the tests of faults, and tells how they ended."""

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from helpers import ROOT

from danube_jax.errors import EXIT_INTERRUPTED

HERE = Path(__file__).parent
TRAIN = ("-m", "danube_jax.train")
EVALUATE = ("-m", "danube_jax.evaluate")
PREPARE = ("tools/prepare_data.py",)
FROM_HF, TO_HF = ("tools/convert_from_hf.py",), ("tools/convert_to_hf.py",)
LIBRARIES = (
    "danube_jax.training.run",
    "danube_jax.report.page",
    "danube_jax.interop.import_hf",
    "danube_jax.interop.export_hf",
)
HANG_SECONDS = 500.0  # far more than any of these commands takes on a busy machine


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a command ended; a negative status is minus the number of the signal that ended it."""

    status: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The lines that begin with ``error:``."""
        return [line for line in self.err.splitlines() if line.startswith("error:")]

    def assert_clear(self) -> None:
        """It ended well, or with one clear line; never in a traceback."""
        assert "Traceback" not in self.err, self.err
        assert self.status in (0, 1, 2, EXIT_INTERRUPTED), (self.status, self.err)
        if self.status in (1, 2):
            assert len(self.errors) == 1, self.err
            assert len(self.errors[0]) > len("error: xx: yy"), self.err


class Running:
    """A command that runs."""

    def __init__(self, forks: "Forks", pid: int, out: Path, err: Path):
        self._forks, self.pid, self._out, self._err = forks, pid, out, err
        self.started = time.monotonic()

    def signal(self, number: int, *, group: bool = False) -> None:
        """Sends a signal to the process, or to all of its group."""
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.pid, number)

    def shown(self) -> str:
        """What it has written on stderr so far."""
        return self._err.read_text(errors="replace") if self._err.exists() else ""

    def poll(self, seconds: float) -> Ended | None:
        """How it ended, if it does within some time."""
        status = self._forks.ask({"wait": self.pid, "timeout": seconds})["status"]
        if status is None:
            return None
        self.signal(signal.SIGKILL, group=True)  # its workers, should any be left
        texts = [path.read_text(errors="replace") for path in (self._out, self._err)]
        return Ended(status, *texts)

    def wait(self, seconds: float = HANG_SECONDS) -> Ended:
        """How it ended; one that hangs is killed and fails the test."""
        ended = self.poll(seconds)
        if ended is None:
            self.signal(signal.SIGABRT)
            time.sleep(0.5)
            self.signal(signal.SIGKILL, group=True)
            raise AssertionError(f"a hang of {seconds} s: {self._err.read_text()}")
        return ended

    def kill(self, *, group: bool) -> Ended:
        """SIGKILL, and how it ended, which may have been by itself."""
        self.signal(signal.SIGKILL, group=group)
        ended = self.poll(HANG_SECONDS)
        assert ended is not None
        return ended


class Forks:
    """Runs commands in forks of a process that has everything imported.

    With `fresh` a command gets an interpreter of its own, as a user's does.
    """

    def __init__(self, scratch: Path, libraries: Sequence[str] = LIBRARIES):
        """`scratch` takes what commands write on stdout and stderr."""
        self._scratch, self._count = scratch, 0
        scratch.mkdir(parents=True, exist_ok=True)
        self._server = subprocess.Popen(
            [sys.executable, str(HERE / "fork_server.py"), *libraries],
            env=os.environ
            | {
                "PYTHONPATH": f"{ROOT}:{HERE}",
                "OPENBLAS_NUM_THREADS": "1",
                "OMP_NUM_THREADS": "1",
                "TF_CPP_MIN_LOG_LEVEL": "2",
                "TQDM_DISABLE": "1",
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            },
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=open(scratch / "server.err", "w"),  # noqa: SIM115
            text=True,
        )
        assert json.loads(self._server.stdout.readline() or "{}").get("ready"), (
            scratch / "server.err"
        ).read_text()

    def ask(self, request: Mapping) -> dict:
        """One request to the server and its answer."""
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def start(
        self,
        program: Sequence[str],
        *arguments: str,
        devices: int = 1,
        environment: Mapping[str, str] | None = None,
        limits: Mapping[str, int] | None = None,
        log: Path | None = None,
        delay: float = 0.0,
        hold: str = "",
        fresh: bool = False,
    ) -> Running:
        """Starts a command.

        Args:
          program: what Python is to run, one of the constants above.
          arguments: of the command.
          devices: virtual CPU devices.
          environment: in addition to this process's.
          limits: resource limits by their names, such as RLIMIT_FSIZE.
          log, delay, hold: of `staged.py`.
          fresh: an interpreter of its own instead of a fork.
        """
        self._count += 1
        out, err = (self._scratch / f"{self._count}.{name}" for name in ("out", "err"))
        xla = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"])
        xla = f"{xla} --xla_force_host_platform_device_count={devices}".strip()
        chosen = {"PYTHONPATH": str(ROOT), "XLA_FLAGS": xla} | dict(environment or {})
        chosen.setdefault("JAX_COMPILATION_CACHE_DIR", os.environ["JAX_COMPILATION_CACHE_DIR"])
        request = {
            "program": [*program, *arguments],
            "folder": str(ROOT),
            "environment": chosen,
            "limits": dict(limits or {}),
            "stdout": str(out),
            "stderr": str(err),
            "log": str(log) if log else None,
            "delay": delay,
            "hold": hold,
        }
        if fresh:  # the fork becomes a new Python, so that the server can wait for it
            prefix = [str(HERE / "staged.py"), str(log), str(delay), hold] if log else []
            request["execute"] = [sys.executable, *prefix, *request["program"]]
        pid = self.ask(request)["pid"]
        return Running(self, pid, out, err)

    def run(self, program: Sequence[str], *arguments: str, **options) -> Ended:
        """Runs a command to its end."""
        return self.start(program, *arguments, **options).wait()

    def close(self) -> None:
        """Ends the server."""
        self._server.kill()
        self._server.wait()
        for stream in (self._server.stdin, self._server.stdout):
            stream.close()


@contextlib.contextmanager
def forks(scratch: Path, libraries: Sequence[str] = LIBRARIES) -> Iterator[Forks]:
    """A server for the time of a block."""
    server = Forks(scratch, libraries)
    try:
        yield server
    finally:
        server.close()
