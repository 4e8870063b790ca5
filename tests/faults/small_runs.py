"""What a run left behind, for comparing it with the run that was never disturbed."""

import collections
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from helpers import read_rows

RATES = ("tokens_per_second", "tokens_per_second_per_device", "tflops_per_second_per_device")
TIMED = (*RATES, "mfu", "data_wait", "memory_bytes")  # of a row of metrics: all that may differ
STEPS = 24


def arguments(config: Path, workdir: Path, *more: str) -> list[str]:
    """Of a run of `STEPS` steps across a phase boundary, with many checkpoints and evaluations."""
    return [
        f"--config={config}",
        f"--workdir={workdir}",
        "--config.model.num_hidden_layers=1",
        "--config.phases[0].tokens=5120",
        "--config.phases[1].tokens=7168",
        "--config.checkpoint.every_steps=3",
        "--config.evaluation.every_steps=8",
        "--config.evaluation.tokens_per_source=1000",
        *more,
    ]


def checkpoint_arrays(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by its path."""
    with ocp.CheckpointManager(workdir / "checkpoints") as manager:
        args = ocp.args.Composite(state=ocp.args.StandardRestore())
        tree = manager.restore(step, args=args)["state"]
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def checkpoint_meta(workdir: Path, step: int) -> dict[str, Any]:
    """The metadata of a checkpoint, checksums of all arrays included."""
    with ocp.CheckpointManager(workdir / "checkpoints") as manager:
        args = ocp.args.Composite(meta=ocp.args.JsonRestore())
        return manager.restore(step, args=args)["meta"]


def rows(workdir: Path, kind: str) -> list[dict[str, Any]]:
    """Rows of metrics without what depends on the clock."""
    return [
        {key: value for key, value in row.items() if key not in TIMED}
        for row in read_rows(workdir, kind)
    ]


def windows_by_step(log: Path) -> dict[int, list[str]]:
    """What `staged.py` noted: the windows of every step; a step run again had the same."""
    out: dict[int, list[str]] = {}
    lines = log.with_suffix(".windows").read_text().splitlines(keepends=True)
    for line in lines:
        if not line.endswith("\n"):
            continue  # torn by a kill; the step is run again
        step, hashes = json.loads(line)
        assert out.setdefault(step, hashes) == hashes, f"step {step} read other windows"
    return out


@dataclasses.dataclass(frozen=True)
class Outcome:
    """All of a run that must not depend on what happened to it on the way."""

    arrays: dict[str, np.ndarray]
    meta: dict[str, Any]
    train: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    windows: collections.Counter | None
    steps: dict[int, list[str]]  # the windows of every step, where these were noted

    @classmethod
    def read(cls, workdir: Path, step: int = STEPS, log: Path | None = None) -> "Outcome":
        """Reads a finished run."""
        windows, by_step = None, {}
        if log is not None:
            by_step = windows_by_step(log)
            assert sorted(by_step) == list(range(1, step + 1))
            windows = collections.Counter(row for hashes in by_step.values() for row in hashes)
        return cls(
            checkpoint_arrays(workdir, step),
            checkpoint_meta(workdir, step),
            rows(workdir, "train"),
            rows(workdir, "evaluation"),
            windows,
            by_step,
        )

    def assert_same(self, other: "Outcome") -> None:
        """Equal to the bit."""
        assert self.arrays.keys() == other.arrays.keys()
        for name, array in self.arrays.items():
            theirs = other.arrays[name]
            assert array.dtype == theirs.dtype
            assert array.tobytes() == theirs.tobytes(), name
        assert self.meta == other.meta
        assert [row["step"] for row in self.train] == list(range(1, len(self.train) + 1))
        assert self.train == other.train
        # A session that ends early, at training.max_steps, evaluates there, too.
        steps = {row["step"] for row in other.evaluations}
        assert [row for row in self.evaluations if row["step"] in steps] == other.evaluations
        if self.windows is not None and other.windows is not None:
            assert self.windows == other.windows


def tree_bytes(folder: Path, leave_out: tuple[str, ...] = ()) -> dict[str, bytes]:
    """Every file under a folder by its path, but for some by name."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in leave_out
    }
