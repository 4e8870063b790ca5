"""Checkpoints: Orbax, asynchronous, complete or not there, and verified when they are read.

A step holds two items: `state`, the arrays of a `TrainState`; and `meta`, JSON with the step, the
data fingerprint and a checksum of every array. The checksums are computed on the devices from
what is saved, and again from what was restored, so that they cover disk, transfer and resharding;
they do not depend on the number of devices.
"""

import dataclasses
import os
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from danube_jax import files
from danube_jax.array_checksums import host_checksum, named_checksums
from danube_jax.config import CheckpointConfig
from danube_jax.console import warn
from danube_jax.errors import DISK_ERRORS, UserError

PyTree = Any


class Checkpointer:
    """Writes and reads the checkpoints of one workdir.

    Attributes:
      damaged: steps that `restore_latest` found newer than what it could use, newest first.
    """

    def __init__(self, directory: Path, config: CheckpointConfig):
        """Opens `directory`, which is made where it does not exist.

        Raises:
          UserError: the folder cannot be written.
        """
        self._directory = Path(directory).absolute()
        self._writing = 0
        self.damaged: list[int] = []
        options = ocp.CheckpointManagerOptions(
            max_to_keep=config.keep_last,
            keep_period=config.keep_every_steps or None,
            enable_async_checkpointing=config.asynchronous,
            cleanup_tmp_directories=True,
        )
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(self._directory, options=options)
        except OSError as error:
            raise UserError(f"{self._directory}: cannot hold checkpoints: {error}") from error

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints on disk, oldest first."""
        self._manager.reload()
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: PyTree, meta: dict[str, Any]) -> None:
        """Begins to write a checkpoint; the one before it is waited for.

        Raises:
          UserError: it or the one before cannot be written (a full disk, say).
        """
        self.wait()
        self._writing = step
        with _write_errors(self._directory, step):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(_stored(state)),
                    meta=ocp.args.JsonSave(
                        files.seal(meta | {"checksums": named_checksums(state)})
                    ),
                ),
                force=True,
            )

    def wait(self) -> None:
        """Returns when everything begun is on disk.

        Raises:
          UserError: it cannot be written.
        """
        with _write_errors(self._directory, self._writing):
            self._manager.wait_until_finished()

    def read_meta(self, step: int) -> dict[str, Any]:
        """The `meta` of one checkpoint."""
        args = ocp.args.Composite(meta=ocp.args.JsonRestore())
        return self._manager.restore(step, args=args)["meta"]

    def restore_latest(self, abstract_state: PyTree) -> tuple[PyTree, dict[str, Any]] | None:
        """The newest checkpoint that can be read and verified, or None where there is none at all.

        What fails is reported by name; where an older one can be used, the failed ones are moved to
        `damaged/` beside the folder, so that the run can write those steps again.

        Args:
          abstract_state: shapes, dtypes and shardings to restore to.

        Raises:
          UserError: there are checkpoints, but none can be used.
        """
        steps = self.steps()
        self.damaged = []
        for step in reversed(steps):
            try:
                state, meta = self._restore(step, abstract_state)
            except Exception as error:  # any reader's error means the same: it cannot be used
                reason = " ".join(str(error).split())[:300]
                warn(f"{self._directory / str(step)}: checkpoint cannot be used: {reason}")
                self.damaged.append(step)
                continue
            for bad in self.damaged:
                self._set_aside(bad)
            return state, meta
        if steps:
            raise UserError(
                f"{self._directory}: none of the checkpoints {steps} can be read; "
                "restore one from a copy, or choose another --workdir to start again"
            )
        return None

    def _restore(self, step: int, abstract_state: PyTree) -> tuple[PyTree, dict[str, Any]]:
        stored, fresh = self._match_optional(step, abstract_state)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(stored), meta=ocp.args.JsonRestore()
            ),
        )
        state, meta = restored["state"], restored["meta"]
        if dataclasses.is_dataclass(abstract_state):
            state = dataclasses.replace(abstract_state, **state | fresh)
        found = {
            name: value
            for name, value in named_checksums(state).items()
            if not name.startswith(tuple(f".{part}" for part in fresh))
        }
        files.check_seal(meta, "meta")
        expected = meta["checksums"]
        wrong = sorted(name for name in found if found[name] != expected.get(name))
        if wrong:
            raise ValueError(f"checksum of {wrong[0]} differs ({len(wrong)} of {len(found)})")
        return state, meta

    def _match_optional(self, step: int, abstract_state: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """What to ask for, and the optional parts that begin afresh.

        These are the ones that the checkpoint lacks, has in another shape, or has and the run does
        not: the last are read and dropped.
        """
        stored, fresh = _stored(abstract_state), {}
        for name in _optional_fields(abstract_state):
            state = ocp.PyTreeCheckpointHandler().metadata(self._directory / str(step) / "state")
            found, wanted = state.tree.get(name, {}), getattr(abstract_state, name)
            if _shapes(found) == _shapes(wanted):
                continue
            stored.pop(name, None)
            shardings = jax.tree.map(lambda leaf: leaf.sharding, wanted)
            zeros = jax.jit(
                lambda tree=wanted: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree),
                out_shardings=shardings,
            )
            fresh[name] = zeros() if jax.tree.leaves(wanted) else wanted
            if found:
                anywhere = jax.tree.leaves(abstract_state)[0].sharding  # of a scalar
                stored[name] = jax.tree.map(
                    lambda leaf, sharding=anywhere: jax.ShapeDtypeStruct(
                        leaf.shape, leaf.dtype, sharding=sharding
                    ),
                    found,
                )
        return stored, fresh

    def _set_aside(self, step: int) -> None:
        """Moves a damaged step out of the way, so that the run can write that step again."""
        if jax.process_index() == 0:
            target = self._directory.parent / "damaged" / str(step)
            shutil.rmtree(target, ignore_errors=True)
            target.parent.mkdir(exist_ok=True)
            shutil.move(self._directory / str(step), target)
        self._manager.reload()

    def close(self) -> None:
        """Waits for what is being written and ends Orbax's threads.

        Raises:
          UserError: it cannot be written.
        """
        with _write_errors(self._directory, self._writing):
            self._manager.close()


def _optional_fields(state: PyTree) -> list[str]:
    """Fields of a dataclass that a checkpoint holds only where they are not empty."""
    if not dataclasses.is_dataclass(state):
        return []
    return [field.name for field in dataclasses.fields(state) if field.metadata.get("optional")]


def _stored(state: PyTree) -> PyTree:
    """What a checkpoint holds of a state: a dataclass as a dict, without empty optional fields."""
    if not dataclasses.is_dataclass(state):
        return state
    optional = _optional_fields(state)
    return {
        field.name: getattr(state, field.name)
        for field in dataclasses.fields(state)
        if field.name not in optional or jax.tree.leaves(getattr(state, field.name))
    }


def _shapes(tree: PyTree) -> list[tuple[int, ...]]:
    return sorted(tuple(leaf.shape) for leaf in jax.tree.leaves(tree))


def read_part(step_folder: Path, name: str, abstract: PyTree) -> PyTree:
    """One field of the `TrainState` in a checkpoint as NumPy arrays, verified.

    Args:
      step_folder: a complete checkpoint, of this run or another; nothing in it is changed.
      name: the field.
      abstract: its shapes and dtypes.

    Raises:
      UserError: it cannot be read, or is not what was written.
    """
    folder = Path(step_folder).absolute()
    item = {name: jax.tree.map(lambda _: 0, abstract)}
    restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
    try:
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
            meta = checkpointer.restore(folder / "meta")
        files.check_seal(meta, "meta")
        expected = meta["checksums"]
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            args = ocp.args.PyTreeRestore(item, restore_args, partial_restore=True)
            part = checkpointer.restore(folder / "state", args=args)[name]
        part = jax.tree.map(np.asarray, part)
        for path, array in jax.tree_util.tree_leaves_with_path(part):
            leaf = f".{name}{jax.tree_util.keystr(path)}"
            if host_checksum(array) != expected[leaf]:
                raise ValueError(f"checksum of {leaf} differs")
        if jax.tree.map(np.shape, part) != jax.tree.map(np.shape, abstract):
            raise ValueError(f"{name} is not that of this optimizer and model")
    except Exception as error:  # any reader's error means the same: it cannot be used
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{folder}: {name} cannot be read: {reason}") from error
    return part


class _write_errors:
    """Turns whatever a failed write raises into one line that names the cause."""

    def __init__(self, directory: Path, step: int):
        self._directory, self._step = directory, step

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, _: Any) -> None:
        if error is None or not isinstance(error, Exception) or isinstance(error, UserError):
            return
        text = " ".join(str(error).split())
        known = re.search("|".join(os.strerror(number) for number in DISK_ERRORS), text)
        cause = known[0] if known else text[:300]
        raise UserError(
            f"{self._directory}: checkpoint {self._step} could not be written: {cause}; "
            "make room or mend the folder and run the same command again: "
            "it continues from the last complete checkpoint"
        ) from error
