"""A process that has imported the project and forks for every command that it is asked to run.

A fresh interpreter spends several seconds on imports. A fork of this one has them behind it, and
has touched no JAX backend and started no thread: from there on it is ``python -m MODULE``.

Reads requests as lines of JSON, answers with lines of JSON; see `commands.Forks`.
"""

import ctypes
import faulthandler
import gc
import importlib
import json
import os
import resource
import signal
import sys
import time
from typing import Any

PR_SET_PDEATHSIG = 1
POLL_SECONDS = 0.005


def serve(modules: list[str]) -> dict[str, Any]:
    """Answers requests; returns the one to become, in a child of this process."""
    for name in modules:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # or every collection in a fork would touch, and so copy, all that is imported
    assert len(os.listdir("/proc/self/task")) == 1, "a fork takes no threads along"
    _answer({"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _answer({"status": _wait(request["wait"], request["timeout"])})
            continue
        pid = os.fork()
        if not pid:
            return request
        os.setpgid(pid, pid)
        _answer({"pid": pid})
    sys.exit(0)


def _answer(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


def _wait(pid: int, timeout: float) -> int | None:
    deadline = time.monotonic() + timeout
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            return None
        time.sleep(POLL_SECONDS)


def become(request: dict[str, Any]) -> None:
    """Turns this child into the command of `request`."""
    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # no orphans of a failed test
    os.chdir(request["folder"])
    os.environ.update(request["environment"])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which background jobs ignore
    for name, flags in (("stdin", os.O_RDONLY), ("stdout", os.O_WRONLY), ("stderr", os.O_WRONLY)):
        path = request.get(name) or os.devnull
        descriptor = os.open(path, flags | (os.O_CREAT | os.O_APPEND if flags else 0))
        os.dup2(descriptor, {"stdin": 0, "stdout": 1, "stderr": 2}[name])
        os.close(descriptor)
    for name, value in request["limits"].items():
        number = getattr(resource, name)
        resource.setrlimit(number, (value, resource.getrlimit(number)[1]))
    if "execute" in request:
        os.execve(request["execute"][0], request["execute"], os.environ)
    faulthandler.enable(sys.stderr)
    import jax

    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    import staged

    program = request["program"]
    if request["log"]:
        staged.install(
            request["log"],
            request["delay"],
            request["hold"],
            program[1] if program[0] == "-m" else program[0],
        )
    staged.run_program(program)


if __name__ == "__main__":
    become(serve(sys.argv[1:]))
