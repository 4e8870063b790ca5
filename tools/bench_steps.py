"""Full train steps that benchmarks time: the trainer's own, and the same model's in PyTorch.

Both run forward, backward, clipping by global norm 1.0 and AdamW over micro-batches whose gradients
are summed, on random tokens.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from danube_jax.config import Fp8Config, ModelConfig, OptimizerConfig, PrecisionConfig
from danube_jax.errors import UserError
from danube_jax.models.decoder import Decoder, init_params
from danube_jax.training.dtypes import DTYPES, linear_dtype
from danube_jax.training.init_from import RUN_FIELDS
from danube_jax.training.mesh import make_mesh, put_batch
from danube_jax.training.objectives import language_modeling
from danube_jax.training.optimizer import make_optimizer
from danube_jax.training.step import (
    TrainState,
    init_state,
    make_train_step,
    state_shardings,
    state_specs,
)

LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM = 2e-4, 0.1, 1.0
FP8_CAPABILITY = (8, 9)  # the first NVIDIA GPUs that multiply FP8 (Ada); Hopper is 9.0
PRECISIONS = ("float32", "bfloat16", "fp8")

Step = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """The tokens of one step: `accumulation` micro-batches of `rows` sequences, all devices."""

    accumulation: int
    rows: int
    context: int

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.accumulation * self.rows * self.context


def precision_config(name: str, fp8: Fp8Config) -> PrecisionConfig:
    """The trainer's precision by the name of its linear layers."""
    return PrecisionConfig(name, "float32" if name == "float32" else "bfloat16", fp8)


def check_precision(name: str, config: ModelConfig) -> None:
    """Makes sure that the model and the device can compute in this precision.

    Raises:
      UserError: FP8 needs sizes that are multiples of 16, and a GPU that multiplies FP8 (a CPU
        converts, and is slow).
    """
    if name != "fp8":
        return
    for key in ("hidden_size", "intermediate_size"):
        if getattr(config, key) % 16:
            raise UserError(
                f"--precision=fp8: {key} {getattr(config, key)} is not possible; FP8 matmuls need "
                "multiples of 16"
            )
    device = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", None) or "999")
    if device.platform == "gpu" and tuple(map(int, capability.split("."))) < FP8_CAPABILITY:
        raise UserError(
            f"--precision=fp8: {device.device_kind} (compute capability {capability}) has no FP8 "
            "tensor cores; they begin with 8.9"
        )


class TrainStep:
    """The trainer's step on random tokens; every call advances the state.

    A call returns the loss as a JAX array, not waited for.
    """

    def __init__(
        self, config: ModelConfig, precision: PrecisionConfig, shape: BatchShape, chunk_tokens: int
    ):
        mesh, dtype = make_mesh(), DTYPES[precision.compute]
        decoder = Decoder(config, dtype, linear_dtype(precision))
        optimizer = make_optimizer(OptimizerConfig(weight_decay=WEIGHT_DECAY))

        def fresh_state() -> TrainState:
            params = init_params(config, jax.random.key(0))
            return init_state(params, optimizer, precision.fp8_config)

        specs = state_specs(jax.eval_shape(fresh_state), mesh.size, zero1=True)
        self._step = make_train_step(
            language_modeling(decoder, z_loss=0.0, chunk_tokens=chunk_tokens),
            optimizer,
            lambda _: jnp.float32(LEARNING_RATE),
            mesh=mesh,
            specs=specs,
            compute_dtype=dtype,
            clip_norm=CLIP_NORM,
            fp8_config=precision.fp8_config,
        )
        tokens = random_tokens(config, shape)
        weights = np.ones(tokens.shape, np.float32)
        weights[..., -1] = 0.0
        arrays = {"tokens": tokens, "targets": np.roll(tokens, -1, axis=-1), "weights": weights}
        self._batch = put_batch(mesh, arrays)
        self._stop = np.zeros(mesh.size, np.int32)
        self._state = jax.jit(fresh_state, out_shardings=state_shardings(mesh, specs))()

    def __call__(self) -> jax.Array:
        self._state, metrics = self._step(self._state, self._batch, self._stop)
        return metrics["loss"]

    def hlo(self) -> str:
        """The optimised program of the step, as text."""
        return self._step.lower(self._state, self._batch, self._stop).compile().as_text()


def make_torch_step(
    config: ModelConfig,
    shape: BatchShape,
    *,
    bfloat16: bool,
    compiled: bool,
    attention: str = "sdpa",
) -> Step:
    """The same step with PyTorch and transformers; the function returned waits for it.

    Weights and AdamW (fused) are float32, matmuls under autocast where `bfloat16`; `compiled` asks
    for torch.compile, and `attention` is transformers' `attn_implementation`.

    Raises:
      UserError: the attention implementation is not installed, or the model cannot use it.
    """
    import torch
    import transformers

    device = torch_device()
    common = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in ("model_type", "sliding_window", *RUN_FIELDS)
    }
    common |= {"head_dim": config.head_size, "attn_implementation": attention}
    try:
        if config.model_type == "mistral":
            hf_config = transformers.MistralConfig(**common, sliding_window=config.sliding_window)
            model = transformers.MistralForCausalLM(hf_config)
        else:
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**common))
    except (ImportError, ValueError) as error:
        line = " ".join(str(error).split())[:200]
        raise UserError(f"--peer_attention={attention}: {line}") from error
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=LEARNING_RATE,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=WEIGHT_DECAY,
        fused=True,
    )
    forward = torch.compile(model) if compiled else model
    tokens = torch.from_numpy(random_tokens(config, shape).astype(np.int64)).to(device)

    def run_step() -> float:
        total = torch.zeros((), device=device)
        for rows in tokens:
            with torch.autocast(device, dtype=torch.bfloat16, enabled=bfloat16):
                loss = forward(input_ids=rows, labels=rows, use_cache=False).loss / len(tokens)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total.item()

    return run_step


def torch_device() -> str:
    """'cuda' where PyTorch has a GPU that JAX uses too, else 'cpu'."""
    import torch

    return "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"


def random_tokens(config: ModelConfig, shape: BatchShape) -> np.ndarray:
    """Uniform token ids, int32 [accumulation, rows, context]."""
    dimensions = (shape.accumulation, shape.rows, shape.context)
    return np.random.default_rng(0).integers(0, config.vocab_size, dimensions, dtype=np.int32)


def measure(steps: Mapping[str, Step], repeats: int, steps_a_repeat: int) -> dict[str, list[float]]:
    """Seconds a call of each of `steps`, one value a repeat, the candidates taking turns."""
    for step in steps.values():  # compiles and warms up
        for _ in range(2):
            jax.block_until_ready(step())
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            for _ in range(steps_a_repeat):
                result = step()
            jax.block_until_ready(result)
            seconds[name].append((time.perf_counter() - start) / steps_a_repeat)
    return seconds


def summarise(
    seconds: list[float], tokens: int, flops_per_token: float, peak: float | None
) -> dict[str, float | None]:
    """Speed of one candidate on one device's share of the work.

    Args:
      seconds: of a step, one value a repeat.
      tokens: of a step and device.
      flops_per_token: model FLOPs, as of `decoder.flops_per_token`.
      peak: the device's dense bfloat16 FLOP/s, or None where it is not known.
    """
    median = statistics.median(seconds)
    return {
        "ms_per_step": 1e3 * median,
        "ms_per_step_min": 1e3 * min(seconds),
        "ms_per_step_max": 1e3 * max(seconds),
        "tokens_per_second": tokens / median,
        "tflops": tokens * flops_per_token / median / 1e12,
        "mfu": tokens * flops_per_token / median / peak if peak else None,
    }
