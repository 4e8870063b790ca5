"""Runs a stage's tasks on datatrove's executors, with progress."""

import contextlib
import copy
import io
import json
import multiprocessing
import os
import re
import signal
import subprocess
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

from datatrove.executor.local import LocalPipelineExecutor
from loguru import logger

from danube_jax.console import console, info
from danube_jax.data.corpus.config import ExecutorConfig
from danube_jax.errors import RunError, UserError

POLL_SECONDS = 0.5
PLAIN_SECONDS = 10.0
SLURM_POLL_SECONDS = 5.0
SLURM_ABSENT_POLLS = 3  # a shared file system may show the last marks of completion late
USER_ERROR = re.compile(r"danube_jax\.errors\.UserError: (.+)")


class _Local(LocalPipelineExecutor):
    """datatrove's, which keeps its log in its files, on a pool that notices when a worker dies.

    datatrove's own pool waits for ever for a worker that was killed, and a process that it forks
    outlives this one where that is killed. The workers here end with this process.

    Args:
      lock: a descriptor that workers hold as long as they live, such as that of a locked file.
    """

    def __init__(self, *, lock: int | None, **shared: Any):
        super().__init__(**shared)
        self._lock = lock

    def run(self) -> None:
        ranks = self.get_incomplete_ranks()
        self.save_executor_as_json()
        if self.workers == 1:
            for rank in ranks:
                self.run_task(rank)
            return
        context = multiprocessing.get_context("forkserver")
        # Workers are forked from a server that has everything imported.
        context.set_forkserver_preload(["danube_jax.data.corpus.pipeline"])
        ended, end = context.Pipe(duplex=False)
        given = (self, ended, None if self._lock is None else _Held(self._lock))
        with ended, end:
            pool = ProcessPoolExecutor(self.workers, context, _begin_worker, given)
            try:
                for done in as_completed([pool.submit(_run_task, rank) for rank in ranks]):
                    done.result()
            except BaseException:
                end.close()  # ends the workers amid their tasks
                raise
            finally:
                pool.shutdown(cancel_futures=True)

    def run_task(self, rank: int) -> None:
        """Runs one task on blocks of its own, since they count, and hold files open."""
        fresh = copy.copy(self)
        fresh.pipeline = copy.deepcopy(self.pipeline)
        fresh._run_for_rank(rank)

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1):
        try:
            # Its log also goes to what is stderr when a task begins.
            with contextlib.redirect_stderr(io.StringIO()):
                return super()._run_for_rank(rank, local_rank, node_rank)
        finally:
            logger.remove()  # datatrove puts its default back


class _Held:
    """A descriptor of which a worker gets a copy."""

    def __init__(self, descriptor: int):
        self._descriptor = descriptor

    def __reduce__(self):
        return _taken, (DupFd(self._descriptor),)


def _taken(copied: Any) -> int:
    return copied.detach()


_worker_executor: _Local | None = None  # in a worker: whose tasks it runs


def _begin_worker(executor: _Local, ended: Connection, lock: int | None) -> None:
    """Begins a worker, which ends when the other end of `ended` does; it never closes `lock`."""
    global _worker_executor
    _worker_executor = executor
    # An interrupt from the terminal is the parent's, which ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(ended,), daemon=True).start()


def _end_with(ended: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        ended.recv()
    os._exit(1)


def _run_task(rank: int) -> None:
    assert _worker_executor is not None
    _worker_executor.run_task(rank)


class Runner:
    """Runs stages one after another."""

    def __init__(self, config: ExecutorConfig, folder: Path, lock: int | None = None):
        """`folder` is for logs and marks; local workers hold the descriptor `lock`."""
        self.config, self.folder, self.lock = config, Path(folder), lock
        self.workers = config.workers or os.cpu_count() or 1

    def run(self, name: str, pipeline: list, tasks: int, total_bytes: int = 0) -> None:
        """Runs the tasks of a stage that are not done yet.

        Args:
          name: of the stage, and of its folder for logs and marks of completion.
          pipeline: datatrove blocks.
          tasks: their number.
          total_bytes: what the reader's heartbeats count up to; 0: progress is by tasks.

        Raises:
          UserError: what a block says of bad input.
        """
        logs = self.folder / name
        executor = self._executor(name, pipeline, tasks, logs)
        if not executor.get_incomplete_ranks():
            return
        logger.remove()
        with _Progress(name, logs, tasks, total_bytes):
            try:
                executor.run()
            except UserError:
                raise
            except BrokenProcessPool:
                raise RunError(
                    f"a worker of the stage {name} was killed, perhaps since memory ran out; fewer "
                    "of them (config.executor.workers) need less; the same command goes on from "
                    "here"
                ) from None
            except Exception as error:
                cause = getattr(error, "cause", None)
                if isinstance(cause, UserError | OSError):  # Ray wraps what a task raises
                    raise cause from None
                raise
            finally:
                logger.remove()
            self._wait(executor, logs)

    def _wait(self, executor: Any, logs: Path) -> None:
        """Slurm returns when the jobs are queued; the others when they are done."""
        if self.config.kind == "slurm":
            _wait_for_jobs(executor)
        missing = executor.get_incomplete_ranks()
        if missing:
            found = _user_error(logs / "slurm")
            if found:
                raise UserError(found)
            raise RunError(
                f"{len(missing)} of {executor.world_size} tasks failed (the first is "
                f"{missing[0]}); {logs / 'logs'} says why; the same command goes on from here"
            )

    def _executor(self, name: str, pipeline: list, tasks: int, logs: Path) -> Any:
        config = self.config
        shared = {"pipeline": pipeline, "tasks": tasks, "logging_dir": str(logs)}
        shared["workers"] = min(tasks, self.workers)
        if config.kind == "local":
            return _Local(lock=self.lock, **shared)
        if config.kind == "ray":
            return _ray_executor(shared, config)
        from datatrove.executor.slurm import SlurmPipelineExecutor

        shared["workers"] = config.workers or -1
        return SlurmPipelineExecutor(
            **shared,
            time=config.time,
            partition=config.partition,
            mem_per_cpu_gb=config.memory_gb,
            job_name=f"danube_{name}",
            sbatch_args=dict(config.options),
            slurm_logs_folder=str(logs / "slurm"),
            mail_type="NONE",
        )


def _wait_for_jobs(executor: Any) -> None:
    """Returns when all tasks are done, or when Slurm no longer has the job in its queue."""
    absent = 0
    while executor.get_incomplete_ranks() and absent < SLURM_ABSENT_POLLS:
        absent = 0 if _is_queued(str(executor.job_id)) else absent + 1
        time.sleep(SLURM_POLL_SECONDS)


def _is_queued(job: str) -> bool:
    """Whether Slurm has the job in its queue, waiting or running; True where it does not say."""
    try:
        found = subprocess.run(
            ["squeue", "--noheader", "--jobs", job], capture_output=True, text=True, check=False
        )
    except OSError:
        return True
    if found.returncode:
        return "invalid job id" not in found.stderr.lower()
    return bool(found.stdout.strip())


def _user_error(folder: Path) -> str:
    """What a failed task said of bad input in its job's log; '' for nothing."""
    for path in sorted(folder.glob("*.out"), key=lambda path: -path.stat().st_mtime):
        found = USER_ERROR.findall(path.read_text(encoding="utf-8", errors="replace"))
        if found:
            return found[-1].strip()
    return ""


def _ray_executor(shared: dict[str, Any], config: ExecutorConfig) -> Any:
    try:
        import ray
    except ImportError:
        raise UserError(
            "config.executor.kind: 'ray' needs the package ray: pip install ray"
        ) from None
    from datatrove.executor.ray import RayPipelineExecutor

    if not ray.is_initialized():
        # A cluster is found by RAY_ADDRESS; without one, Ray starts on this machine.
        ray.init(logging_level="ERROR", log_to_driver=False, include_dashboard=False)
    return RayPipelineExecutor(**shared, mem_per_cpu_gb=config.memory_gb)


class _Progress:
    """Adds up the tasks' heartbeats: share, documents/s, MB/s, time left."""

    def __init__(self, name: str, logs: Path, tasks: int, total_bytes: int):
        self._name, self._logs, self._tasks, self._total = name, logs, tasks, total_bytes
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "_Progress":
        self._begin, self._start = time.monotonic(), self._read()
        self._status = console.status(f"{self._name} …") if console.is_terminal else None
        if self._status:
            self._status.start()
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stop.set()
        self._thread.join()
        if self._status:
            self._status.stop()
        if error[0] is None:
            info(f"{self._name}: {self._line(done=True)}")

    def _read(self) -> tuple[int, int, int, int]:
        """(bytes of input, documents, bytes of text, finished tasks)."""
        rows = []
        for path in (self._logs / "progress").glob("[0-9]*.json"):
            try:
                rows.append(json.loads(path.read_text()))
            except (OSError, ValueError):
                continue
        finished = len(list((self._logs / "completions").glob("*")))
        size, documents, text = (sum(row[i] for row in rows) for i in range(3))
        return size, documents, text, finished

    def _line(self, done: bool = False) -> str:
        now = self._read()
        seconds = max(1e-6, time.monotonic() - self._begin)
        parts = []
        share = now[0] / self._total if self._total else now[3] / self._tasks
        if not done:
            parts.append(f"{min(1.0, share):.0%}")
        if now[1]:
            parts.append(f"{now[1]:,} documents")
            parts.append(f"{(now[1] - self._start[1]) / seconds:,.0f} documents/s")
            parts.append(f"{(now[2] - self._start[2]) / seconds / 1e6:,.1f} MB/s")
        before = self._start[0] / self._total if self._total else self._start[3] / self._tasks
        if done:
            parts.append(f"{seconds:,.1f} s")
        elif share > before:
            parts.append(f"{seconds * (1 - min(1.0, share)) / (share - before):,.0f} s left")
        return ", ".join(parts)

    def _watch(self) -> None:
        shown = time.monotonic()
        while not self._stop.wait(POLL_SECONDS):
            if self._status:
                self._status.update(f"{self._name}: {self._line()}")
            elif time.monotonic() - shown >= PLAIN_SECONDS:
                shown = time.monotonic()
                info(f"{self._name}: {self._line()}")
