"""What a device reaches on the parts of a train step, each alone.

The matmuls of one layer at the sizes of a micro-batch (four linear layers, each with its output,
input gradient and weight gradient), memory bandwidth, and attention: the rates that a static
estimate of the step assumes.

Legend: M tokens, I features in, O features out.
"""

import functools
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from bench_steps import measure
from jax import lax

from danube_jax.config import ModelConfig
from danube_jax.models import fp8
from danube_jax.models.attention import attention
from danube_jax.models.projections import FUSED, projection_shapes
from danube_jax.training.step import COMPILER_OPTIONS

KINDS = ("output", "input gradient", "weight gradient")

_LAST = (((1,), (1,)), ((), ()))
_INNER = (((1,), (0,)), ((), ()))
_FIRST = (((0,), (0,)), ((), ()))


def layer_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(features in, out) of the four linear modules of a layer."""
    shapes = projection_shapes(config)
    return {
        module: (shapes[names[0]][0], sum(shapes[name][1] for name in names))
        for (_, module), names in FUSED.items()
    }


def _dot(left: jax.Array, right: jax.Array, dimensions: Any, dtype: Any, fast: bool) -> jax.Array:
    precision = lax.Precision.DEFAULT if fast else lax.Precision.HIGHEST
    return lax.dot_general(
        left, right, dimensions, precision=precision, preferred_element_type=dtype
    )


def matmul(kind: str, precision: str, fast: bool) -> Callable:
    """One matmul of the step as a function of its operands, in the layouts that the step has.

    A weight gradient takes its float32 sum first, and returns the next one.
    """

    def run(left: jax.Array, right: jax.Array, scale: jax.Array) -> jax.Array:
        dimensions = _LAST
        if precision != "fp8":
            dimensions = dict(zip(KINDS, (_INNER, _LAST, _FIRST), strict=True))[kind]
            return _dot(left, right, dimensions, left.dtype, fast)
        return _dot(left, right, dimensions, jnp.bfloat16, fast) * scale.astype(jnp.bfloat16)

    def add(total: jax.Array, left: jax.Array, right: jax.Array, scale: jax.Array) -> jax.Array:
        dimensions = _LAST if precision == "fp8" else _FIRST
        product = _dot(left, right, dimensions, jnp.float32, fast)
        return total + (product * scale if precision == "fp8" else product)

    return add if kind == "weight gradient" else run


def operands(
    kind: str, precision: str, tokens: int, sizes: tuple[int, int]
) -> tuple[jax.Array, jax.Array]:
    """Random operands of one matmul: FP8 contracts the last dimension of both."""
    inputs, outputs = sizes
    shapes = {
        "output": ((tokens, inputs), (inputs, outputs)),
        "input gradient": ((tokens, outputs), (inputs, outputs)),
        "weight gradient": ((tokens, inputs), (tokens, outputs)),
    }[kind]
    left, right = (
        jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i, shape in enumerate(shapes)
    )
    if precision != "fp8":
        dtype = jnp.dtype(precision)
        return left.astype(dtype), right.astype(dtype)
    one = jnp.float32(1)
    formats = {
        "output": (fp8.E4M3, fp8.E4M3),
        "input gradient": (fp8.E5M2, fp8.E4M3),
        "weight gradient": (fp8.E4M3, fp8.E5M2),
    }[kind]
    left, right = (
        fp8.quantize(x, one, dtype) for x, dtype in zip((left, right), formats, strict=True)
    )
    if kind == "output":
        return left, right.T
    return (left, right) if kind == "input gradient" else (left.T, right.T)


def measure_matmuls(
    config: ModelConfig,
    tokens: int,
    precisions: Sequence[str],
    repeats: int,
    steps: int,
    on_case: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Rates of all matmuls of a layer; a row holds the shape, the mode, TFLOP/s and the kernel."""
    rows = []
    for layer, sizes in layer_shapes(config).items():
        for kind in KINDS:
            on_case(f"{layer}: {kind}")
            for precision in precisions:
                left, right = operands(kind, precision, tokens, sizes)
                for fast in (True, False):
                    seconds, kernel = _time_matmul(
                        kind, precision, fast, left, right, sizes, repeats, steps
                    )
                    rows.append(
                        {
                            "layer": layer,
                            "kind": kind,
                            "shape": [tokens, *sizes],
                            "precision": precision,
                            "fast_accumulation": fast,
                            "microseconds": 1e6 * seconds,
                            "tflops": 2 * tokens * sizes[0] * sizes[1] / seconds / 1e12,
                            "kernel": kernel,
                        }
                    )
    return rows


def _time_matmul(
    kind: str,
    precision: str,
    fast: bool,
    left: jax.Array,
    right: jax.Array,
    sizes: tuple[int, int],
    repeats: int,
    steps: int,
) -> tuple[float, str]:
    scale = jnp.float32(1)
    run = matmul(kind, precision, fast)
    if kind != "weight gradient":
        compiled = _compile(run, left, right, scale)
        step = functools.partial(compiled, left, right, scale)
        return _median(step, repeats, steps), kernel_name(compiled.as_text())
    total = jnp.zeros(sizes, jnp.float32)
    compiled = _compile(run, total, left, right, scale, donate=(0,))

    def accumulate() -> jax.Array:
        nonlocal total
        total = compiled(total, left, right, scale)
        return total

    return _median(accumulate, repeats, steps), kernel_name(compiled.as_text())


def kernel_name(hlo: str) -> str:
    """What runs the matmul, by the targets of the program's library calls; 'XLA' where none."""
    targets = re.findall(r'custom_call_target="([^"]+)"', hlo)
    targets = [target for target in targets if "matmul" in target or "gemm" in target]
    return ", ".join(dict.fromkeys(targets)) or "XLA"


def measure_bandwidth(
    config: ModelConfig, tokens: int, repeats: int, steps: int
) -> list[dict[str, Any]]:
    """GB/s of bytes read and written once: a copy, and what quantises between the matmuls.

    The array is the widest of a layer, [tokens, 2 * intermediate_size] in bfloat16.
    """
    x = jax.random.normal(jax.random.key(0), (tokens, 2 * config.intermediate_size), jnp.bfloat16)
    scale = jnp.float32(1)

    def both_layouts(x: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
        quantized = fp8.quantize(x, scale, fp8.E4M3)
        return quantized, quantized.T

    # Bytes an element: read, then written.
    cases: dict[str, tuple[Callable, int]] = {
        "copy (bfloat16, negated)": (lambda x, _: -x, 2 + 2),
        "largest magnitude": (lambda x, _: fp8.amax(x), 2),
        "quantise to E4M3": (lambda x, scale: fp8.quantize(x, scale, fp8.E4M3), 2 + 1),
        "quantise and transpose": (lambda x, scale: fp8.quantize(x, scale, fp8.E4M3).T, 2 + 1),
        "quantise in both layouts": (both_layouts, 2 + 1 + 1),
    }
    rows = []
    for name, (function, size) in cases.items():
        compiled = _compile(function, x, scale)
        seconds = _median(functools.partial(compiled, x, scale), repeats, steps)
        gigabytes = x.size * size / 1e9
        rows.append(
            {"what": name, "gigabytes": gigabytes, "gigabytes_per_second": gigabytes / seconds}
        )
    return rows


def measure_attention(
    config: ModelConfig,
    tokens: int,
    contexts: Sequence[int],
    dtype: Any,
    repeats: int,
    steps: int,
    on_case: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Rates of the attention that the step uses, forward and backward, whole and windowed.

    FLOPs of the forward pass are 4 a query head's size and visible key; of the backward pass 2.5
    times that, since it computes the scores again (Dao et al., arXiv 2205.14135, section 3.2).
    """
    rows = []
    for context in contexts:
        windows = [None]
        if config.sliding_window is not None and config.sliding_window < context:
            windows.append(config.sliding_window)
        for window in windows:
            on_case(f"attention at context {context}, window {window or 'none'}")
            rows.append(_time_attention(config, tokens, context, window, dtype, repeats, steps))
    return rows


def _time_attention(
    config: ModelConfig,
    tokens: int,
    context: int,
    window: int | None,
    dtype: Any,
    repeats: int,
    steps: int,
) -> dict[str, Any]:
    batch, heads, size = max(tokens // context, 1), config.num_attention_heads, config.head_size
    shapes = [(batch, context, n, size) for n in (heads, *(config.num_key_value_heads,) * 2)]
    q, k, v = (jax.random.normal(jax.random.key(i), s, dtype) for i, s in enumerate(shapes))
    do = jax.random.normal(jax.random.key(3), shapes[0], dtype)

    def forward(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention(q, k, v, sliding_window=window, backend=config.attention_backend)

    def both(q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array) -> Any:
        out, pullback = jax.vjp(forward, q, k, v)
        return out, pullback(do)

    forward_program, both_program = _compile(forward, q, k, v), _compile(both, q, k, v, do)
    seconds = measure(
        {
            "forward": functools.partial(forward_program, q, k, v),
            "both": functools.partial(both_program, q, k, v, do),
        },
        repeats,
        steps,
    )
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    backward = medians["both"] - medians["forward"]
    seen = min(window or context, context)
    keys = seen - seen * (seen - 1) / (2 * context)  # of a query, its own included, on average
    flops = 4.0 * batch * context * heads * size * keys
    targets = re.findall(r'custom_call_target="([^"]+)"', both_program.as_text())
    return {
        "context": context,
        "window": window,
        "head_size": size,
        "rows": batch,
        "forward_microseconds": 1e6 * medians["forward"],
        "backward_microseconds": 1e6 * backward,
        "forward_tflops": flops / medians["forward"] / 1e12,
        # On a busy machine the difference of two times may be nothing.
        "backward_tflops": 2.5 * flops / backward / 1e12 if backward > 0 else None,
        "kernel": ", ".join(dict.fromkeys(t for t in targets if "fmha" in t)) or "XLA",
    }


def _compile(function: Callable, *arguments: Any, donate: tuple[int, ...] = ()) -> Any:
    options = COMPILER_OPTIONS if jax.default_backend() == "gpu" else {}
    lowered = jax.jit(function, donate_argnums=donate).lower(*arguments)
    return lowered.compile(compiler_options=options)


def _median(step: Callable[[], Any], repeats: int, steps: int) -> float:
    return statistics.median(measure({"": step}, repeats, steps)[""])


def roofline(
    config: ModelConfig,
    *,
    tokens: int,
    precisions: Sequence[str],
    contexts: Sequence[int],
    repeats: int,
    steps: int,
    on_case: Callable[[str], None],
) -> dict[str, Any]:
    """Everything above, for micro-batches of `tokens` tokens on one device.

    `on_case` is told what is measured next.
    """
    dtype = jnp.float32 if list(precisions) == ["float32"] else jnp.bfloat16
    on_case("memory bandwidth")
    parts = {
        "bandwidth": measure_bandwidth(config, tokens, repeats, steps),
        "attention": measure_attention(config, tokens, contexts, dtype, repeats, steps, on_case),
        "matmuls": measure_matmuls(config, tokens, precisions, repeats, steps, on_case),
    }
    return parts | {"rates": mean_rates(parts)}


def mean_rates(parts: Mapping[str, list[dict[str, Any]]]) -> dict[str, float]:
    """One rate a kind of kernel, as a static estimate takes them.

    Of matmuls, all work over all time, with fast accumulation for output and input gradient only;
    of attention, the first context's, unwindowed; of memory, quantising in both layouts.
    """
    names = {"fp8": "fp8_tflops", "bfloat16": "bf16_tflops", "float32": "f32_tflops"}
    rates = {}
    for precision, name in names.items():
        rows = [
            row
            for row in parts["matmuls"]
            if row["precision"] == precision
            and row["fast_accumulation"] == (row["kind"] != "weight gradient")
        ]
        work = sum(row["tflops"] * row["microseconds"] for row in rows)
        if rows:
            rates[name] = work / sum(row["microseconds"] for row in rows)
    for direction in ("forward", "backward"):
        rate = parts["attention"][0][f"{direction}_tflops"]
        if rate is not None:
            rates[f"attention_{direction}_tflops"] = rate
    return rates | {"memory_gbps": parts["bandwidth"][-1]["gigabytes_per_second"]}


def print_roofline(report: Mapping[str, Any]) -> None:
    """The tables for people."""
    print(f"{'memory':<30}{'GB':>8}{'GB/s':>10}")
    for row in report["bandwidth"]:
        print(f"{row['what']:<30}{row['gigabytes']:>8.3f}{row['gigabytes_per_second']:>10,.1f}")
    print(
        f"\n{'attention':<22}{'rows':>6}{'forward us':>14}{'TFLOP/s':>10}"
        f"{'backward us':>14}{'TFLOP/s':>10}  kernels"
    )
    for row in report["attention"]:
        name = f"{row['context']:,}, window {row['window'] or 'none'}"
        backward = row["backward_tflops"]
        print(
            f"{name:<22}{row['rows']:>6}{row['forward_microseconds']:>14,.1f}"
            f"{row['forward_tflops']:>10.3f}{row['backward_microseconds']:>14,.1f}"
            f"{'-' if backward is None else f'{backward:.3f}':>10}  {row['kernel']}"
        )
    print(
        f"\n{'matmul':<14}{'':<17}{'M x I x O':<22}{'precision':<11}{'adds up':<10}"
        f"{'us':>12}{'TFLOP/s':>10}  kernel"
    )
    for row in report["matmuls"]:
        print(
            f"{row['layer']:<14}{row['kind']:<17}{' x '.join(map(str, row['shape'])):<22}"
            f"{row['precision']:<11}{'fast' if row['fast_accumulation'] else 'exact':<10}"
            f"{row['microseconds']:>12,.1f}{row['tflops']:>10.3f}  {row['kernel']}"
        )
    rates = " ".join(f"--{name}={rate:.4g}" for name, rate in report["rates"].items())
    print(f"\nmean rates, as tools/plan.py takes them: {rates}")
