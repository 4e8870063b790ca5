"""Runs one of the project's commands, noting what it is doing, and slowly where it commits.

Usage: staged.py LOG DELAY HOLD -m MODULE ARGUMENT...   or with SCRIPT.py instead of -m MODULE

A line of LOG is written whenever the stage changes: what the main thread does, and after a bar what
goes on in the background. DELAY is how many seconds every rename and the writing of a checkpoint
take longer, so that a kill can fall into them. The first time that the stage HOLD is entered, the
thread that enters it waits for the file LOG.go. Nothing that is computed or written changes.
"""

import asyncio
import functools
import hashlib
import itertools
import json
import os
import runpy
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

START_UP = "start-up"
LONGEST_HOLD = 120.0


class StageLog:
    """Appends stages to a file with one write each, which a kill cannot tear."""

    def __init__(self, path: str, hold: str = ""):
        self._hold, self._go = hold, Path(f"{path}.go")
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._lock = threading.Lock()
        self._main, self._background = START_UP, ""

    def main(self, stage: str) -> None:
        """The main thread begins something else."""
        self._main = stage
        self._note(stage)

    def background(self, stage: str) -> None:
        """So does the writing of a checkpoint."""
        self._background = stage
        self._note(stage)

    def _note(self, entered: str) -> None:
        with self._lock:
            os.write(self._file, f"{self._main}|{self._background}\n".encode())
        if entered and entered == self._hold:
            self._hold = ""
            deadline = time.monotonic() + LONGEST_HOLD
            while not self._go.exists() and time.monotonic() < deadline:
                time.sleep(0.002)

    def around(self, owner: Any, name: str, stage: str, after: str | None = None) -> None:
        """Replaces a function by one that notes `stage` while it runs."""
        original = getattr(owner, name)

        @functools.wraps(original)
        def noted(*args: Any, **kwargs: Any) -> Any:
            before = self._main
            self.main(stage)
            try:
                return original(*args, **kwargs)
            finally:
                self.main(after or before)

        setattr(owner, name, noted)


def read_stage(path: Path) -> str:
    """The last stage in a log: the background's where something went on there."""
    lines = path.read_text().splitlines() if path.exists() else []
    if not lines:
        return START_UP
    main, background = lines[-1].split("|")
    return background or main


def install(log_path: str, delay: float, hold: str, program: str) -> None:
    """Puts the notes into the modules that `program` is about to use."""
    log = StageLog(log_path, hold)
    _slow_renames(log, delay)
    if program.endswith("train"):
        _stage_training(log, delay, Path(log_path).with_suffix(".windows"))
    elif program.endswith("evaluate"):
        from danube_jax.evaluation import loading, results, run

        log.around(loading, "open_for_evaluation", "loading")
        log.around(run, "run_tasks", "evaluation")
        log.around(results, "write_results", "results")
    elif program.endswith("prepare_data.py"):
        from danube_jax.data.corpus import html, pipeline

        _stage_runner(log, pipeline.Runner)
        log.around(pipeline, "train_on_documents", "preparation: tokenizer")
        log.around(pipeline._Preparation, "_finish", "preparation: finish")
        log.around(pipeline.Statistics, "save", "preparation: statistics", "preparation: finish")
        log.around(html, "write_page", "preparation: page")
    elif program.endswith("convert_to_hf.py"):
        from danube_jax.interop import export_hf, model_source

        log.around(model_source, "open_model", "export: opening")
        log.around(export_hf, "_write_weights", "export: writing", "export: configs and card")
        log.around(export_hf, "verify_model", "export: checking", "export: commit")
    elif program.endswith("convert_from_hf.py"):
        from danube_jax.interop import import_hf

        log.around(import_hf, "import_model", "import: opening")
        log.around(import_hf, "_write_weights", "import: writing", "import: commit")


def _slow_renames(log: StageLog, delay: float) -> None:
    for name in ("rename", "replace"):
        original = getattr(os, name)

        def slow(*args: Any, original: Callable = original, **kwargs: Any) -> None:
            time.sleep(delay / 2)
            original(*args, **kwargs)
            time.sleep(delay / 2)

        setattr(os, name, slow)


def _stage_runner(log: StageLog, runner: type) -> None:
    original = runner.run

    def run(self: Any, name: str, *args: Any, **kwargs: Any) -> None:
        log.main(f"preparation: {name}")
        original(self, name, *args, **kwargs)

    runner.run = run


def _stage_training(log: StageLog, delay: float, windows: Path) -> None:
    from orbax.checkpoint import checkpoint_manager
    from orbax.checkpoint._src.path import atomicity

    from danube_jax.report import page
    from danube_jax.training import loop, run
    from danube_jax.training.checkpoint import Checkpointer
    from danube_jax.training.terminal import TrainingDisplay

    log.around(run, "open_run_data", "opening data")
    log.around(loop.Trainer, "__init__", "set-up")
    log.around(Checkpointer, "restore_latest", "restoring")
    log.around(loop.Trainer, "_evaluate", "evaluation")
    log.around(loop.Trainer, "_sample", "samples")
    log.around(page, "report_at_end", "report")
    log.around(TrainingDisplay, "enter_phase", "compile", "compile")
    _note_windows(loop.Trainer, windows)

    make_train_step = loop.make_train_step

    def make(*args: Any, **kwargs: Any) -> Callable:
        step = make_train_step(*args, **kwargs)

        calls = itertools.count()

        def noted(*inputs: Any) -> Any:
            out = step(*inputs)
            log.main("steps" if next(calls) else "first step")
            return out

        return noted

    loop.make_train_step = make

    save = Checkpointer.save

    def noted_save(self: Any, *args: Any) -> None:
        log.main("begin of a save")
        log.background("")
        save(self, *args)
        log.main("steps")

    finalize = atomicity.AtomicRenameTemporaryPath.finalize

    async def slow_finalize(self: Any) -> None:
        if self.get_final().name.isdigit():  # the step's folder; its items come before it
            log.background("asynchronous save")
            await asyncio.sleep(2 * delay)
            log.background("commit")
            await finalize(self)
            await asyncio.sleep(delay)
        else:
            log.background("asynchronous save")
            await asyncio.sleep(delay)
            await finalize(self)

    finish = checkpoint_manager.CheckpointManager._finalize

    def noted_finish(self: Any, step: int, old: list[int]) -> None:
        finish(self, step, old)
        log.background("")

    sweep = checkpoint_manager.CheckpointManager._finalize_checkpoint

    def noted_sweep(self: Any, step: int) -> None:
        sweep(self, step)
        log.background("removal of old ones")

    Checkpointer.save = noted_save
    atomicity.AtomicRenameTemporaryPath.finalize = slow_finalize
    checkpoint_manager.CheckpointManager._finalize = noted_finish
    checkpoint_manager.CheckpointManager._finalize_checkpoint = noted_sweep


def _note_windows(trainer: type, path: Path) -> None:
    """Notes what every step was given: a line with the step and a hash of each row."""
    device_batches = trainer._device_batches

    def noted(self: Any, stop: Any) -> Any:
        import numpy as np

        for step, item in enumerate(device_batches(self, stop), self.step + 1):
            tokens = np.concatenate(
                [np.asarray(shard.data) for shard in item[0]["tokens"].addressable_shards], axis=1
            )
            rows = tokens.reshape(-1, tokens.shape[-1])
            hashes = [hashlib.blake2b(row.tobytes(), digest_size=8).hexdigest() for row in rows]
            with open(path, "a") as file:
                file.write(json.dumps([step, hashes]) + "\n")
            yield item

    trainer._device_batches = noted


def run_program(arguments: list[str]) -> None:
    """Runs ``-m MODULE ARGUMENT...`` or ``SCRIPT ARGUMENT...`` as Python itself would."""
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    log_path, delay, hold, *rest = sys.argv[1:]
    install(log_path, float(delay), hold, rest[1] if rest[0] == "-m" else rest[0])
    run_program(rest)
