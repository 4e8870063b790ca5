"""Compiles a run's training step for NVIDIA H100s on a machine that has none.

XLA's GPU compiler needs a description of the device, not the device, and no driver. The result is
the optimised program and its memory plan; it cannot run. Matmul algorithms are not autotuned, and
the workspace of cuDNN's kernels, which cuDNN itself would report, counts as empty.
"""

import dataclasses
import functools
import importlib.util
import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from danube_jax.config import RunConfig
from danube_jax.data.loader import micro_batches
from danube_jax.data.phases import Phase, PhaseSchedule
from danube_jax.errors import UserError
from danube_jax.models.decoder import Decoder, init_params
from danube_jax.training.dtypes import DTYPES, linear_dtype
from danube_jax.training.hlo_account import Account
from danube_jax.training.mesh import DATA_AXIS
from danube_jax.training.objectives import language_modeling
from danube_jax.training.optimizer import learning_rate_schedule, make_optimizer
from danube_jax.training.step import (
    TrainState,
    init_state,
    make_train_step,
    state_shardings,
    state_specs,
)

INSTALL = "pip install -e '.[aot]'"
DEVICES_PER_HOST = 8
CUDNN_VERSION = 92_800
DEVICE_MEMORY = 84_929_347_584  # bytes, as the driver reports them
# An H100 SXM5 80 GB. XLA leaves out calls of cuBLAS and cuDNN that these versions do not have.
H100 = f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: {DEVICE_MEMORY}
  shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 28 patch: 0 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def unavailable() -> str | None:
    """Why this machine cannot compile for H100, or None where it can.

    JAX must not look for a GPU, which JAX_PLATFORMS=cpu keeps it from: where none is there, the
    plug-in would refuse to load.
    """
    for module in ("jax_cuda13_plugin", "jax_plugins.xla_cuda13"):
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:  # the parent package is missing
            found = None
        if found is None:
            return f"compiling for H100 needs `{INSTALL}`: no module {module}"
    try:
        h100_mesh(1)
    except Exception as error:  # whatever the plug-in raises
        return f"the CUDA plug-in does not load: {' '.join(str(error).split())[:200]}"
    return None


@functools.cache
def h100_mesh(devices: int) -> Mesh:
    """A mesh of H100s that are not there, on one host up to eight, above that eight a host.

    Raises:
      UserError: `devices` are neither up to eight nor whole hosts.
    """
    hosts = -(-devices // DEVICES_PER_HOST)
    if hosts > 1 and devices % DEVICES_PER_HOST:
        raise UserError(
            f"{devices} devices: expected up to {DEVICES_PER_HOST}, or a multiple of it"
        )
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=H100, topology=f"1x{hosts}x{devices // hosts}"
    )
    return Mesh(np.array(topology.devices), (DATA_AXIS,))


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """Bytes of one device, by the compiler's plan.

    Attributes:
      state: parameters, moments and what else a run carries from step to step.
      batch: tokens, targets and weights of a step.
      temporary: weights to compute with, gradient sums and activations.
      peak: of all these together.
      updated_in_place: of the state, what a step overwrites rather than writes anew.
      attention_workspace: what cuDNN's backward pass will want besides, which is in none of the
        others: float32 gradients of the queries.
    """

    state: int
    batch: int
    temporary: int
    peak: int
    updated_in_place: int
    attention_workspace: int

    @property
    def needed(self) -> int:
        """Peak with the workspace."""
        return self.peak + self.attention_workspace


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """A step as an H100 would run it.

    Attributes:
      text: the optimised HLO.
      tokens: of a micro-batch on one device.
      micro_batches: of a step.
      devices: in all.
    """

    text: str
    memory: StepMemory
    tokens: int
    micro_batches: int
    devices: int

    @functools.cached_property
    def account(self) -> Account:
        """Kernels of the program."""
        return Account(self.text)


def compile_phase(
    run: RunConfig, phase: Phase, devices: int, microbatch_tokens: int | None = None
) -> CompiledStep:
    """Compiles the step of one phase of a pretraining run.

    Args:
      run: a validated config.
      phase: of the run's schedule.
      devices: H100s in all.
      microbatch_tokens: of a device, in place of the config's; need not divide the batch.

    Raises:
      UserError: batch, micro-batch and devices do not divide.
    """
    if microbatch_tokens is None:
        count, rows = micro_batches(run, phase, devices)
    else:
        rows = microbatch_tokens // phase.context * devices
        count = max(2, round(phase.sequences / rows))
    shape = (count, rows, phase.context)
    return compile_step(run, shape, devices)


def compile_step(run: RunConfig, shape: tuple[int, int, int], devices: int) -> CompiledStep:
    """Compiles the step that the trainer would run, from shapes alone.

    Args:
      run: a validated config whose objective is pretraining.
      shape: [A, B, T]: micro-batches, rows of one on all devices, context.
      devices: H100s in all.
    """
    mesh = h100_mesh(devices)
    optimizer = make_optimizer(run.optimizer)
    compute_dtype, fp8_config = DTYPES[run.precision.compute], run.precision.fp8_config
    state = jax.eval_shape(
        lambda: init_state(init_params(run.model, jax.random.key(0)), optimizer, fp8_config)
    )
    specs = state_specs(state, devices, run.training.zero1)
    step = make_train_step(
        language_modeling(
            Decoder(run.model, compute_dtype, linear_dtype(run.precision)),
            z_loss=run.training.z_loss,
            chunk_tokens=run.training.loss_chunk_tokens,
        ),
        optimizer,
        learning_rate_schedule(run.optimizer, PhaseSchedule.from_config(run)),
        mesh=mesh,
        specs=specs,
        compute_dtype=compute_dtype,
        clip_norm=run.optimizer.clip_norm,
        fp8_config=fp8_config,
    )
    dtypes = {"tokens": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}
    if run.data.mask_documents:
        dtypes["segment_ids"] = jnp.int32
    batch = {key: jax.ShapeDtypeStruct(shape, dtype) for key, dtype in dtypes.items()}
    compiled = _compile(step.lower, state, batch, jax.ShapeDtypeStruct((devices,), jnp.int32))

    analysis = compiled.memory_analysis()
    state_bytes = _bytes_a_device(state, state_shardings(mesh, specs))
    tokens = shape[1] * shape[2] // devices
    return CompiledStep(
        text=compiled.as_text(),
        memory=StepMemory(
            state=state_bytes,
            batch=analysis.argument_size_in_bytes - state_bytes,
            temporary=analysis.temp_size_in_bytes,
            peak=analysis.peak_memory_in_bytes,
            updated_in_place=analysis.alias_size_in_bytes,
            attention_workspace=4 * tokens * run.model.num_attention_heads * run.model.head_size,
        ),
        tokens=tokens,
        micro_batches=shape[0],
        devices=devices,
    )


def _compile(lower: Callable[..., Any], *arguments: Any) -> Any:
    from jax._src.cudnn import fused_attention_stablehlo

    # JAX asks the cuDNN of this machine for its version, which need not have one.
    version = mock.patch.object(
        fused_attention_stablehlo, "check_cudnn_version", create=True, return_value=CUDNN_VERSION
    )
    with version:
        lowered = lower(*arguments)
    return lowered.compile()


def _bytes_a_device(state: TrainState, shardings: TrainState) -> int:
    sizes = jax.tree.map(
        lambda leaf, sharding: math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize,
        state,
        shardings,
    )
    return sum(jax.tree.leaves(sizes))
