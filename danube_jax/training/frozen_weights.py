"""Weights that a run reads and never changes: the base of adapters, the reference of DPO."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from danube_jax.console import info
from danube_jax.errors import UserError
from danube_jax.interop.hf_weights import set_leaf
from danube_jax.interop.model_source import CHECKPOINTS, LeafReader, open_model

PyTree = Any


@dataclasses.dataclass(frozen=True)
class FrozenWeights:
    """A model's weights on every device.

    Attributes:
      params: matrices in the dtype to compute in, vectors float32; whole on each device.
      path: a Hugging Face folder or one checkpoint; relative to the workdir if inside it.
      fingerprint: of all values, as they are stored.
    """

    params: PyTree
    path: str
    fingerprint: str

    def describe(self) -> dict[str, str]:
        """For the metadata of checkpoints."""
        return {"path": self.path, "fingerprint": self.fingerprint}


def load_frozen(
    path: str, workdir: Path, mesh: Mesh, dtype: jnp.dtype, expected: Mapping[str, str] | None
) -> FrozenWeights:
    """Reads a model, adapters merged, and puts it on all devices.

    Args:
      path: a Hugging Face folder, a workdir (its newest checkpoint that can be read) or one step.
      workdir: the run's.
      mesh: the devices.
      dtype: of matrices.
      expected: what `describe` gave when the run began; its checkpoint is read, not a newer one.

    Raises:
      UserError: it cannot be read, or is not what it was when the run began.
    """
    if expected is not None:
        path = expected["path"]
        if not os.path.isabs(path):
            path = str(workdir / path)
    source = open_model(path)
    (params, fingerprint), step = source.with_reader(_read)
    replicated = NamedSharding(mesh, P())

    def place(leaf: np.ndarray) -> jax.Array:
        kind = dtype if leaf.ndim >= 2 else jnp.float32
        return jax.make_array_from_callback(
            leaf.shape, replicated, lambda index: np.asarray(leaf[index], kind)
        )

    if expected is not None and fingerprint != expected["fingerprint"]:
        raise UserError(
            f"{path}: the weights are not those that this run began with (fingerprint "
            f"{fingerprint}, then {expected['fingerprint']}); bring them back, or choose another "
            "--workdir to start again"
        )
    folder = Path(os.path.abspath(source.path))
    folder = folder if step is None else folder / CHECKPOINTS / str(step)
    inside = folder.is_relative_to(os.path.abspath(workdir))
    if inside:
        folder = folder.relative_to(os.path.abspath(workdir))
    placed = jax.tree.map(place, params)
    if expected is None:
        info(f"frozen weights: {path}{'' if step is None else f', step {step}'}")
    return FrozenWeights(placed, str(folder), fingerprint)


def _read(reader: LeafReader) -> tuple[PyTree, str]:
    params: dict[str, Any] = {}
    reader.fingerprinting = True
    for leaf, array in reader:
        set_leaf(params, leaf.path, array)
    return params, reader.fingerprint()
