"""Times the full train step: forward, backward, clipping by global norm 1.0, AdamW.

Example:
  python tools/bench_train.py --model=16m --batch=4 --context=512
  python tools/bench_train.py --model=danube --precision=bfloat16 --batch=8 --context=2048

Where PyTorch and transformers are installed, the same model is timed there too (eager, SDPA
attention, fused AdamW), the two taking turns so that a busy machine disturbs both alike.
--peer=none leaves it out. Prints a table and one JSON object.

MFU = model FLOPs of the step / time / the device's dense bfloat16 peak; the FLOPs count matmuls
and attention (causal at half, sliding window exactly) of forward and backward, no recomputation.
"""

import dataclasses
import datetime
import importlib.metadata
import importlib.util
import json
import runpy
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from bench_models import SMALL_MODELS

from danube_jax import command_line, files
from danube_jax.config import (
    ATTENTION_BACKENDS,
    REMAT_POLICIES,
    ModelConfig,
    OptimizerConfig,
    parse_config,
)
from danube_jax.errors import UserError
from danube_jax.models import decoder as decoder_lib
from danube_jax.training.mesh import make_mesh, put_batch
from danube_jax.training.metrics import peak_flops
from danube_jax.training.objectives import language_modeling
from danube_jax.training.optimizer import make_optimizer
from danube_jax.training.step import (
    TrainState,
    init_state,
    make_train_step,
    state_shardings,
    state_specs,
)

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM = 2e-4, 0.1, 1.0

_MODEL = flags.DEFINE_string(
    "model", "16m", f"{', '.join(SMALL_MODELS)}, or the name of a file in configs/."
)
_HIDDEN_SIZE = flags.DEFINE_integer("hidden_size", None, "Overrides the model's size.")
_INTERMEDIATE_SIZE = flags.DEFINE_integer("intermediate_size", None, "Overrides the model's size.")
_LAYERS = flags.DEFINE_integer("layers", None, "Overrides the model's number of layers.")
_HEADS = flags.DEFINE_integer("heads", None, "Overrides the model's number of query heads.")
_KV_HEADS = flags.DEFINE_integer("kv_heads", None, "Overrides the model's number of KV heads.")
_VOCAB_SIZE = flags.DEFINE_integer("vocab_size", None, "Overrides the model's vocabulary size.")
_SLIDING_WINDOW = flags.DEFINE_integer("sliding_window", None, "Overrides the model's window.")
_PRECISION = flags.DEFINE_string("precision", "float32", "float32 or bfloat16.")
_BATCH = flags.DEFINE_integer("batch", 4, "Sequences in a step.")
_CONTEXT = flags.DEFINE_integer("context", 512, "Tokens in a sequence.")
_STEPS = flags.DEFINE_integer("steps", 3, "Steps in one repeat.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Repeats; the median is reported.")
_REMAT = flags.DEFINE_string("remat", "none", f"One of {', '.join(REMAT_POLICIES)}.")
_BACKEND = flags.DEFINE_string(
    "attention_backend", "auto", f"One of {', '.join(ATTENTION_BACKENDS)}."
)
_CHUNK = flags.DEFINE_integer(
    "loss_chunk_tokens", 8_192, "Tokens whose logits are held at once; 0 for all."
)
_PEER = flags.DEFINE_string("peer", "auto", "auto (PyTorch where it is installed) or none.")
_JSON = flags.DEFINE_string("json", None, "Also writes the JSON object to this file.")

Step = Callable[[], Any]


def make_step(
    config: ModelConfig, dtype: jnp.dtype, batch: int, context: int, chunk_tokens: int
) -> Step:
    """Initialises a model on random tokens; the function returned runs one step of the trainer.

    Each call advances the state and returns the loss as a JAX array, not waited for.
    """
    mesh = make_mesh()
    if batch % mesh.size:
        raise UserError(f"--batch={batch}: expected a multiple of the {mesh.size} devices")
    objective = language_modeling(
        decoder_lib.Decoder(config, dtype), z_loss=0.0, chunk_tokens=chunk_tokens
    )
    optimizer = make_optimizer(OptimizerConfig(weight_decay=WEIGHT_DECAY))

    def fresh_state() -> TrainState:
        return init_state(decoder_lib.init_params(config, jax.random.key(0)), optimizer)

    specs = state_specs(jax.eval_shape(fresh_state), mesh.size, zero1=True)
    train_step = make_train_step(
        objective,
        optimizer,
        lambda _: jnp.float32(LEARNING_RATE),
        mesh=mesh,
        specs=specs,
        compute_dtype=dtype,
        clip_norm=CLIP_NORM,
    )
    tokens = random_tokens(config, batch, context)[None]
    weights = np.ones(tokens.shape, np.float32)
    weights[..., -1] = 0.0
    arrays = {"tokens": tokens, "targets": np.roll(tokens, -1, axis=-1), "weights": weights}
    device_batch = put_batch(mesh, arrays)
    stop = np.zeros(mesh.size, np.int32)
    state = jax.jit(fresh_state, out_shardings=state_shardings(mesh, specs))()

    def run_step() -> jax.Array:
        nonlocal state
        state, metrics = train_step(state, device_batch, stop)
        return metrics["loss"]

    return run_step


def make_torch_step(config: ModelConfig, bfloat16: bool, batch: int, context: int) -> Step:
    """The same step with PyTorch eager and transformers; the function returned waits for it."""
    import torch
    import transformers

    device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
    common = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in ("model_type", "attention_backend", "remat", "sliding_window")
    }
    common |= {"head_dim": config.head_size, "attn_implementation": "sdpa"}
    if config.model_type == "mistral":
        hf_config = transformers.MistralConfig(**common, sliding_window=config.sliding_window)
        model = transformers.MistralForCausalLM(hf_config)
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**common))
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=LEARNING_RATE,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=WEIGHT_DECAY,
        fused=True,
    )
    tokens = torch.from_numpy(random_tokens(config, batch, context).astype(np.int64)).to(device)

    def run_step() -> float:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=bfloat16):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return run_step


def random_tokens(config: ModelConfig, batch: int, context: int) -> np.ndarray:
    """Uniform token ids, int32 [batch, context]."""
    return np.random.default_rng(0).integers(0, config.vocab_size, (batch, context), dtype=np.int32)


def measure(steps: dict[str, Step], repeats: int, steps_a_repeat: int) -> dict[str, list[float]]:
    """Seconds a step of each of `steps`, one value a repeat, the candidates taking turns."""
    for step in steps.values():  # compiles and warms up
        for _ in range(2):
            jax.block_until_ready(step())
    seconds = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            for _ in range(steps_a_repeat):
                result = step()
            jax.block_until_ready(result)
            seconds[name].append((time.perf_counter() - start) / steps_a_repeat)
    return seconds


def summarise(seconds: list[float], tokens: int, flops_per_token: float, peak: float | None):
    """Speed of one candidate as a flat dict."""
    median = statistics.median(seconds)
    return {
        "ms_per_step": 1e3 * median,
        "ms_per_step_min": 1e3 * min(seconds),
        "ms_per_step_max": 1e3 * max(seconds),
        "tokens_per_second": tokens / median,
        "tflops": tokens * flops_per_token / median / 1e12,
        "mfu": tokens * flops_per_token / median / peak if peak else None,
    }


def model_config() -> ModelConfig:
    """The model that the flags ask for.

    Raises:
      UserError: a flag has an impossible value.
    """
    _require_choice("precision", _PRECISION.value, ("float32", "bfloat16"))
    _require_choice("peer", _PEER.value, ("auto", "none"))
    _require_choice("remat", _REMAT.value, REMAT_POLICIES)
    _require_choice("attention_backend", _BACKEND.value, ATTENTION_BACKENDS)
    sizes = {
        "hidden_size": _HIDDEN_SIZE.value,
        "intermediate_size": _INTERMEDIATE_SIZE.value,
        "num_hidden_layers": _LAYERS.value,
        "num_attention_heads": _HEADS.value,
        "num_key_value_heads": _KV_HEADS.value,
        "vocab_size": _VOCAB_SIZE.value,
        "sliding_window": _SLIDING_WINDOW.value,
    }
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise UserError(f"{name}: expected a positive number, got {value}")
    counts = {"batch": _BATCH.value, "steps": _STEPS.value, "repeats": _REPEATS.value}
    for name, value in counts.items():
        if value < 1:
            raise UserError(f"--{name}={value}: expected a positive number")
    if _CHUNK.value < 0:
        raise UserError(f"--loss_chunk_tokens={_CHUNK.value}: expected zero or a positive number")
    if _CONTEXT.value < 2:
        raise UserError(f"--context={_CONTEXT.value}: expected at least 2, to predict a token")
    config = dataclasses.replace(
        named_model(_MODEL.value),
        **{name: value for name, value in sizes.items() if value is not None},
        remat=_REMAT.value,
        attention_backend=_BACKEND.value,
    )
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % kv_heads:
        raise UserError(f"--kv_heads={kv_heads}: expected a divisor of {heads} query heads")
    if config.hidden_size % (2 * heads):
        raise UserError(
            f"--heads={heads}: hidden size {config.hidden_size} must be an even head size times it"
        )
    return config


def named_model(name: str) -> ModelConfig:
    """A small model of this tool, or the model of a file in configs/."""
    if name in SMALL_MODELS:
        return SMALL_MODELS[name]
    path = CONFIGS / f"{name}.py"
    if not path.is_file():
        known = [*SMALL_MODELS, *sorted(path.stem for path in CONFIGS.glob("*.py"))]
        raise UserError(f"--model={name}: expected one of {', '.join(known)}")
    return parse_config(runpy.run_path(str(path))["get_config"]()).model


def _require_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UserError(f"--{name}={value}: expected one of {', '.join(choices)}")


def benchmark(config: ModelConfig) -> dict[str, Any]:
    """Runs the benchmark that the flags describe on `config`; everything to report."""
    bfloat16 = _PRECISION.value == "bfloat16"
    dtype = jnp.bfloat16 if bfloat16 else jnp.float32
    batch, context = _BATCH.value, _CONTEXT.value
    steps = {"danube_jax": make_step(config, dtype, batch, context, _CHUNK.value)}
    packages = ["jax", "jaxlib", "flax", "optax"]
    if _PEER.value == "auto" and importlib.util.find_spec("torch"):
        steps["pytorch"] = make_torch_step(config, bfloat16, batch, context)
        packages += ["torch", "transformers"]
    seconds = measure(steps, _REPEATS.value, _STEPS.value)
    device = jax.devices()[0].device_kind
    peak = peak_flops(device)
    flops = decoder_lib.flops_per_token(config, context)
    results = {
        name: summarise(values, batch * context, flops, peak) for name, values in seconds.items()
    }
    ratio = None
    if "pytorch" in results:
        ratio = results["pytorch"]["ms_per_step"] / results["danube_jax"]["ms_per_step"]
    return {
        "model": dataclasses.asdict(config),
        "parameters": decoder_lib.param_count(config),
        "precision": _PRECISION.value,
        "batch": batch,
        "context": context,
        "steps": _STEPS.value,
        "repeats": _REPEATS.value,
        "gflops_per_token": flops / 1e9,
        "results": results,
        "speed_over_pytorch": ratio,
        "device": device,
        "peak_tflops": peak / 1e12 if peak else None,
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "date": datetime.date.today().isoformat(),
    }


def print_table(report: dict[str, Any]) -> None:
    """The report for people."""
    print(
        f"{_MODEL.value}: {report['parameters']:,} parameters, {report['precision']}, "
        f"batch {report['batch']} x {report['context']}, "
        f"{report['gflops_per_token']:.3f} GFLOP a token, {report['device']}"
    )
    print(f"{'':<12}{'ms/step':>10}{'min':>10}{'max':>10}{'tokens/s':>12}{'TFLOP/s':>10}{'MFU':>8}")
    for name, row in report["results"].items():
        mfu = "-" if row["mfu"] is None else f"{row['mfu']:.1%}"
        times = "".join(
            f"{row[key]:>10.1f}" for key in ("ms_per_step", "ms_per_step_min", "ms_per_step_max")
        )
        print(f"{name:<12}{times}{row['tokens_per_second']:>12,.0f}{row['tflops']:>10.3f}{mfu:>8}")
    if report["speed_over_pytorch"] is not None:
        print(f"danube_jax runs at {report['speed_over_pytorch']:.2f} times PyTorch's speed")


def main(argv: Sequence[str]) -> int:
    """Checks the flags, measures, reports; returns the exit status."""
    command_line.parse_flags(argv, __doc__)
    report = benchmark(model_config())
    print_table(report)
    print(json.dumps(report))
    if _JSON.value:
        files.write_json(_JSON.value, report)
    return 0


if __name__ == "__main__":
    command_line.run(main)
