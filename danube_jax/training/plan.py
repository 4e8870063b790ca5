"""What a run will take, before it is started and without allocating it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from danube_jax.config import RunConfig
from danube_jax.data.loader import micro_batches
from danube_jax.data.phases import PhaseSchedule, check_repetition, source_use
from danube_jax.errors import UserError
from danube_jax.models.decoder import Decoder, abstract_params, flops_per_token
from danube_jax.training.dtypes import DTYPES, linear_dtype
from danube_jax.training.objectives import language_modeling
from danube_jax.training.optimizer import learning_rate_schedule

# Model FLOP/s a GPU that the Danube report's 292.7k tokens/s on 8 x H100 amount to at context
# 2,048, causal attention at half (arXiv 2401.16818, section 4).
REPORT_FLOPS_PER_GPU = 412e12

TRACED_CONTEXT = 128  # tokens of the sequences that activations are extrapolated from

USABLE_MEMORY = 0.92  # of a device's memory, as `train.py` lets JAX take; CUDA and cuDNN need some


@dataclasses.dataclass(frozen=True)
class Target:
    """A device to plan for."""

    name: str
    memory_bytes: int


TARGETS = {
    "h100": Target("H100 80 GB", 84_929_347_584),  # as its driver reports
    "h200": Target("H200 141 GB", 141 * 10**9),
    "a100": Target("A100 80 GB", 80 * 10**9),
    "a100_40gb": Target("A100 40 GB", 40 * 10**9),
    "rtx4090": Target("RTX 4090 24 GB", 24 * 10**9),
}


@dataclasses.dataclass(frozen=True)
class PhasePlan:
    """One phase: exact counts, and the time at the rate that was assumed."""

    name: str
    tokens: int
    steps: int
    context_length: int
    sequences_per_step: int
    micro_batches: int
    flops_per_token: float
    first_learning_rate: float
    last_learning_rate: float
    tokens_per_second: float
    days: float


@dataclasses.dataclass(frozen=True)
class SourcePlan:
    """One source: tokens the run reads, tokens there are (None: no store yet), epochs."""

    name: str
    tokens_read: int
    tokens_available: int | None
    epochs: float | None
    max_epochs: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run will take; bytes are a device's. `rate_source` says where its time comes from."""

    name: str
    devices: int
    target: str
    parameters: dict[str, int]
    memory: dict[str, int]
    memory_limit: int
    checkpoint_bytes: int
    flops: float
    phases: tuple[PhasePlan, ...]
    sources: tuple[SourcePlan, ...]
    warnings: tuple[str, ...]
    rate_source: str

    @property
    def days(self) -> float:
        """Days of training, without evaluation and saving."""
        return sum(phase.days for phase in self.phases)


def make_plan(
    run: RunConfig,
    *,
    devices: int,
    target: str,
    available: Mapping[str, int | None],
    tokens_per_second: float | None = None,
) -> Plan:
    """Plans a run.

    Args:
      run: a validated config.
      devices: accelerators in all.
      target: a key of `TARGETS`.
      available: tokens of each source's training store; None where there is none yet.
      tokens_per_second: assumed rate over all devices; None takes the model FLOP/s of the Danube
        report for each phase's context.

    Raises:
      UserError: an unknown target.
    """
    if target not in TARGETS:
        raise UserError(f"--target={target}: expected one of {', '.join(TARGETS)}")
    schedule = PhaseSchedule.from_config(run)
    parameters = parameters_by_part(run)
    problems: list[str] = []
    phases = tuple(
        _plan_phase(run, schedule, i, devices, tokens_per_second, problems)
        for i in range(len(schedule.phases))
    )
    sources = _plan_sources(run, schedule, available, problems)
    memory = memory_by_part(run, schedule, devices)
    limit = int(TARGETS[target].memory_bytes * USABLE_MEMORY)
    if sum(memory.values()) > limit:
        problems.append(
            f"will not fit: {sum(memory.values()) / 1e9:.1f} GB a device, of which {target} has "
            f"{limit / 1e9:.1f} GB to use; lower training.microbatch_tokens, set model.remat, or "
            "use more devices with training.zero1"
        )
    return Plan(
        name=run.name,
        devices=devices,
        target=TARGETS[target].name,
        parameters=parameters,
        memory=memory,
        memory_limit=limit,
        checkpoint_bytes=12 * sum(parameters.values()),
        flops=sum(phase.flops_per_token * phase.tokens for phase in phases),
        phases=phases,
        sources=sources,
        warnings=tuple(problems),
        rate_source="the rate given" if tokens_per_second else "the Danube report's rate",
    )


def parameters_by_part(run: RunConfig) -> dict[str, int]:
    """Parameters of the embedding, attention, MLP, norms and head."""
    parts = {"embedding": 0, "attention": 0, "mlp": 0, "norms": 0, "head": 0}
    names = {"embed_tokens": "embedding", "self_attn": "attention", "lm_head": "head"}
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(run.model)):
        keys = [entry.key for entry in path]
        part = next((names[key] for key in keys if key in names), None)
        part = part or ("mlp" if "mlp" in keys else "norms")
        parts[part] += leaf.size
    return parts


def memory_by_part(run: RunConfig, schedule: PhaseSchedule, devices: int) -> dict[str, int]:
    """Bytes a device: state, weights to compute with, gradients, activations of the worst phase.

    Activations are what autodiff saves for the backward pass at the run's remat policy; XLA may
    save less by recomputing cheap operations, and needs some workspace beside them.
    """
    count = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(run.model)))
    shards = devices if run.training.zero1 else 1
    compute_bytes = jnp.dtype(DTYPES[run.precision.compute]).itemsize
    tokens = max(
        run.training.microbatch_tokens or phase.batch_tokens // devices for phase in schedule.phases
    )
    chunk = min(run.training.loss_chunk_tokens or tokens, tokens)
    return {
        "master parameters (float32)": 4 * count // shards,
        "AdamW moments (float32)": 8 * count // shards,
        f"weights ({run.precision.compute})": compute_bytes * count,
        "gradients (float32)": 4 * count,
        "activations": activation_bytes(run, tokens),
        "logits of a loss chunk": chunk * run.model.vocab_size * (2 * compute_bytes + 4),
    }


def activation_bytes(run: RunConfig, tokens: int) -> int:
    """Bytes that a forward pass over `tokens` tokens saves for its backward pass.

    The residuals of `jax.vjp` are traced for models of one and of two layers and for one and two
    short sequences; what grows with layers and with sequences is extrapolated. It assumes an
    attention that saves no scores (cuDNN's and the blocked one do not).
    """
    one, two = (_saved_bytes_per_token(run, layers) for layers in (1, 2))
    return round((one + (run.model.num_hidden_layers - 1) * (two - one)) * tokens)


def _saved_bytes_per_token(run: RunConfig, layers: int) -> float:
    dtype = DTYPES[run.precision.compute]
    model = dataclasses.replace(
        run.model, num_hidden_layers=layers, attention_backend="blocked", sliding_window=None
    )
    objective = language_modeling(
        Decoder(model, dtype, linear_dtype(run.precision)),
        z_loss=run.training.z_loss,
        chunk_tokens=0,
    )
    weights = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype if len(leaf.shape) > 1 else leaf.dtype),
        abstract_params(model),
    )

    def saved(rows: int) -> int:
        shape = (rows, TRACED_CONTEXT)
        batch = {
            "tokens": jax.ShapeDtypeStruct(shape, jnp.int32),
            "targets": jax.ShapeDtypeStruct(shape, jnp.int32),
            "weights": jax.ShapeDtypeStruct(shape, jnp.float32),
        }
        if run.data.mask_documents:
            batch["segment_ids"] = jax.ShapeDtypeStruct(shape, jnp.int32)

        def residuals(weights: Any, batch: Any) -> Any:
            return jax.vjp(lambda w: objective(w, batch)[0], weights)[1]

        leaves = jax.tree.leaves(jax.eval_shape(residuals, weights, batch))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    return (saved(2) - saved(1)) / TRACED_CONTEXT


def _plan_phase(
    run: RunConfig,
    schedule: PhaseSchedule,
    index: int,
    devices: int,
    tokens_per_second: float | None,
    problems: list[str],
) -> PhasePlan:
    phase = schedule.phases[index]
    flops = flops_per_token(run.model, phase.context)
    rate = tokens_per_second or REPORT_FLOPS_PER_GPU * devices / flops
    try:
        accumulation, _ = micro_batches(run, phase, devices)
    except UserError as error:
        problems.append(str(error))
        accumulation = 0
    learning_rate = learning_rate_schedule(run.optimizer, schedule)
    first, last = (
        float(np.asarray(learning_rate(jnp.int32(step))))
        for step in (phase.first_step, phase.first_step + phase.steps - 1)
    )
    return PhasePlan(
        name=phase.name,
        tokens=phase.tokens,
        steps=phase.steps,
        context_length=phase.context,
        sequences_per_step=phase.sequences,
        micro_batches=accumulation,
        flops_per_token=flops,
        first_learning_rate=first,
        last_learning_rate=last,
        tokens_per_second=rate,
        days=phase.tokens / rate / 86_400,
    )


def _plan_sources(
    run: RunConfig,
    schedule: PhaseSchedule,
    available: Mapping[str, int | None],
    problems: list[str],
) -> tuple[SourcePlan, ...]:
    unknown = 1 << 60  # more than any run reads: one pass over part of it
    counts = {name: available.get(name) or unknown for name in schedule.sources}
    plans = []
    for name in schedule.sources:
        known = available.get(name)
        try:
            use = source_use(schedule, counts)[name]
            check_repetition(run, {name: use})
        except UserError as error:
            problems.append(str(error))
            counts[name] = unknown
            use = source_use(schedule, counts)[name]
        read = sum(
            windows * phase.context
            for windows, phase in zip(use.windows, schedule.phases, strict=True)
        )
        if known is None:
            least = read / run.data.sources[name].max_epochs
            problems.append(
                f"source {name!r} has no token store yet: it needs {least:,.0f} tokens or more "
                f"(max_epochs {run.data.sources[name].max_epochs:g})"
            )
        plans.append(
            SourcePlan(
                name=name,
                tokens_read=read,
                tokens_available=known,
                epochs=read / known if known else None,
                max_epochs=run.data.sources[name].max_epochs,
            )
        )
    return tuple(plans)
