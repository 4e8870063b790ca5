"""Rounds of tuning as runs of their own, each starting from the result of the one before."""

import dataclasses
from pathlib import Path

from danube_jax.config import RoundConfig, RunConfig
from danube_jax.training.events import FINISHED
from danube_jax.training.workdir import CHECKPOINTS, ROUNDS


def split_rounds(run: RunConfig, workdir: Path) -> list[tuple[RunConfig, Path]]:
    """A config of one round, and its folder, for each round of the run.

    The last one's folder is `workdir`, so that it names the final model; the others' are
    `workdir`/rounds/NUMBER-NAME.
    """
    out: list[tuple[RunConfig, Path]] = []
    last = len(run.rounds) - 1
    for i, row in enumerate(run.rounds):
        folder = workdir if i == last else workdir / ROUNDS / f"{i + 1}-{row.name}"
        one = _one_round(run, row)
        if out:
            before = dataclasses.replace(
                run.init_from, path=str(out[-1][1]), model_from_source=False
            )
            one = dataclasses.replace(one, init_from=before)
        out.append((one, folder))
    return out


def first_workdir(run: RunConfig, workdir: Path) -> Path:
    """The folder of the first round."""
    return split_rounds(run, workdir)[0][1]


def is_complete(folder: Path, total_steps: int) -> bool:
    """Whether a round's folder holds its last checkpoint."""
    return (folder / CHECKPOINTS / str(total_steps)).is_dir()


def is_finished(folder: Path, total_steps: int) -> bool:
    """Whether an earlier session also ended the round: nothing that was due then is missing."""
    metrics = folder / "metrics.jsonl"
    if not is_complete(folder, total_steps) or not metrics.is_file():
        return False
    event = f'"event": "{FINISHED}"'
    return any(event in line for line in metrics.read_text(encoding="utf-8").splitlines())


def _one_round(run: RunConfig, row: RoundConfig) -> RunConfig:
    optimizer = run.optimizer
    if row.learning_rate is not None:
        # The same shape: the floor is the same share of the peak.
        final = optimizer.final_learning_rate * row.learning_rate / optimizer.learning_rate
        optimizer = dataclasses.replace(
            optimizer, learning_rate=row.learning_rate, final_learning_rate=final
        )
    return dataclasses.replace(run, rounds=(row,), optimizer=optimizer)
