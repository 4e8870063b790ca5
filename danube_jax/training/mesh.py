"""The device mesh: one axis, `data`; what is sharded over it, and how processes find each other."""

import contextlib
import os
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from danube_jax.console import warn
from danube_jax.errors import UserError

DATA_AXIS = "data"
HEARTBEAT_SECONDS = 100


def initialize_distributed(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    heartbeat_seconds: int = HEARTBEAT_SECONDS,
) -> bool:
    """Joins the processes of a multi-host run; a single process needs nothing.

    The explicit arguments win; otherwise SLURM's and Open MPI's environment variables are used
    where they name more than one process. `heartbeat_seconds`: a process that is silent for longer
    is taken for dead, and the others end.

    Returns:
      Whether there are several.

    Raises:
      UserError: the explicit arguments are incomplete, or the other processes cannot be reached.
    """
    explicit = (coordinator_address, num_processes, process_id)
    if any(value is not None for value in explicit):
        if any(value is None for value in explicit):
            raise UserError(
                "--coordinator_address, --num_processes and --process_id go together; "
                f"got {coordinator_address!r}, {num_processes!r}, {process_id!r}"
            )
        arguments: dict[str, Any] = {
            "coordinator_address": coordinator_address,
            "num_processes": num_processes,
            "process_id": process_id,
        }
    elif not has_launcher(os.environ):
        return False
    else:
        arguments = {"local_device_ids": local_device_ids(os.environ)}
    # JAX would take SIGTERM for itself; a run has its own way to stop (training/signals.py).
    with contextlib.suppress(AttributeError):  # a version of JAX that has no such service
        jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(**arguments, heartbeat_timeout_seconds=heartbeat_seconds)
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"the processes of this run could not be joined: {error}") from error
    return True


def has_launcher(environment: Mapping[str, str]) -> bool:
    """Whether SLURM's srun or Open MPI's mpirun started this process among others."""
    if int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return True
    if int(environment.get("SLURM_NTASKS", 1)) > 1:
        if "SLURM_STEP_NODELIST" in environment:
            return True
        warn("SLURM has several tasks but this process was not started by srun: running alone")
    return False


def local_device_ids(environment: Mapping[str, str]) -> list[int] | None:
    """Which of the GPUs that it sees a launched process takes; [] means all of them.

    A process that is alone on its host drives all its GPUs, and so does one to which the launcher
    shows only its own. Otherwise None: JAX gives the n-th process of a host the n-th GPU.
    """
    tasks = environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") or environment.get(
        "SLURM_STEP_TASKS_PER_NODE", "2"
    )
    alone = re.fullmatch(r"1(\(x\d+\))?", tasks) is not None
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    return [] if alone or (visible and "," not in visible) else None


def make_mesh() -> Mesh:
    """All devices of all processes on one axis, a process's devices next to each other."""
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(devices), (DATA_AXIS,))


def shard_spec(shape: tuple[int, ...], num_devices: int) -> P:
    """The spec that shards an array's first divisible dimension; vectors stay replicated.

    Norm scales are too small for sharding to pay.
    """
    if num_devices > 1 and len(shape) >= 2:
        for dim, size in enumerate(shape):
            if size % num_devices == 0:
                return P(*([None] * dim), DATA_AXIS)
    return P()


def sharded_dim(spec: P) -> int | None:
    """The dimension that `spec` shards over the data axis, or None."""
    return spec.index(DATA_AXIS) if DATA_AXIS in spec else None


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of a [A, B, ...] batch: micro-batches in time, rows over devices."""
    return NamedSharding(mesh, P(None, DATA_AXIS))


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's part [A, B_local, ...] of every array as global device arrays [A, B, ...]."""
    sharding = batch_sharding(mesh)
    return {
        key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()
    }
