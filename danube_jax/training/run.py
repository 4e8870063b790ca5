"""From a config to trained weights: opens data and tasks, and runs the loop over each."""

from pathlib import Path

import jax

from danube_jax.config import RunConfig
from danube_jax.console import console, info, warn
from danube_jax.training.init_from import resolve_model
from danube_jax.training.loop import Trainer
from danube_jax.training.pretraining import Pretraining
from danube_jax.training.rounds import (
    first_workdir,
    is_complete,
    is_finished,
    split_rounds,
)
from danube_jax.training.run_data import open_run_data
from danube_jax.training.signals import StopRequest
from danube_jax.training.task import Task
from danube_jax.training.tuning import open_round, tuning_tokenizer
from danube_jax.training.workdir import check_workdir


def train(run: RunConfig, workdir: Path, stop: StopRequest) -> int:
    """Trains, or resumes what `workdir` holds; returns the process's exit status.

    Raises:
      UserError: the config, the data, the workdir or the disk does not allow it.
      RunError: the run diverged.
    """
    console.quiet = jax.process_index() != 0
    if jax.default_backend() == "cpu":
        if Path("/dev/nvidia0").exists():
            warn("a GPU is present but JAX does not use it: pip install -e '.[cuda]'")
        else:
            info("no accelerator found: running on the CPU")
    elif masks_documents(run) and run.model.attention_backend == "auto":
        warn(
            "cuDNN's attention cannot mask documents: using the dense one, whose memory grows "
            "with the square of the context"
        )
    if run.objective != "pretrain":
        return tune(run, workdir, stop)
    run = resolve_model(run, workdir)
    check_workdir(workdir, run)
    return run_task(Pretraining(run, workdir, open_run_data(run, workdir)), stop)


def masks_documents(run: RunConfig) -> bool:
    """Whether training keeps attention within documents or examples."""
    if run.objective == "pretrain":
        return run.data.mask_documents
    return run.objective == "dpo" or run.chat.packing != "none"


def tune(run: RunConfig, workdir: Path, stop: StopRequest) -> int:
    """Runs the rounds of a tuning config one after another; returns the process's exit status.

    The last round's folder is `workdir` itself; earlier ones are in `workdir`/rounds, and each is a
    run of its own that starts from the one before. All data is read before the first begins.

    Raises:
      UserError: the config, the data, a workdir or the disk does not allow it.
      RunError: a round diverged.
    """
    run = resolve_model(run, first_workdir(run, workdir))
    tokenizer = tuning_tokenizer(run)
    rounds = split_rounds(run, workdir)
    for one, folder in rounds:
        check_workdir(folder, one)
    tasks = [open_round(one, folder, tokenizer) for one, folder in rounds]
    for i, task in enumerate(tasks):
        if len(tasks) > 1:
            info(f"round {i + 1} of {len(tasks)}: {task.run.rounds[0].name}")
        if i < len(tasks) - 1 and is_finished(task.workdir, task.schedule.total_steps):
            info(f"complete, in {task.workdir}")
            continue
        status = run_task(task, stop)
        if status:
            return status
        if i < len(tasks) - 1 and not is_complete(task.workdir, task.schedule.total_steps):
            info("the next round begins when this one is complete")
            break
    return 0


def run_task(task: Task, stop: StopRequest) -> int:
    """Trains one task to its end, or until it is asked to stop; returns the exit status."""
    trainer = Trainer(task)
    try:
        return trainer.run(stop)
    finally:
        trainer.close()
