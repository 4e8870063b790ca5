"""Times the full train step: micro-batches forward and backward, clipping by global norm, AdamW.

Examples:
  python tools/bench_train.py --model=danube --precision=bfloat16,fp8 \\
      --context=2048,4096,8192,16384 --batch_tokens=147456 --microbatch_tokens=16384
  python tools/bench_train.py --model=danube --precision=fp8 --context=2048 --profile=traces
  python tools/bench_train.py --model=danube --roofline --precision=bfloat16,fp8 \\
      --context=2048,4096,8192,16384 --microbatch_tokens=16384
  python tools/bench_train.py --model=16m --batch=4 --context=512

Where PyTorch and transformers are installed, the same model is timed there too (SDPA attention,
fused AdamW; with torch.compile on a GPU). On a CPU the candidates take turns, so that a busy
machine disturbs them alike; on a GPU each has the memory to itself, in a process of its own.

--profile also records a trace a case and prints the time by class of kernel. --roofline measures
the parts of a step instead: the matmuls of a layer, memory bandwidth and attention, on one device.

MFU = model FLOPs of the step / time / the device's dense bfloat16 peak, in FP8 too; the FLOPs count
matmuls and attention (causal at half, sliding window exactly) of forward and backward, no
recomputation. Prints a table and one JSON object.
"""

import dataclasses
import datetime
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from bench_models import SMALL_MODELS, named_model
from bench_profile import print_profile, profile
from bench_roofline import print_roofline, roofline
from bench_steps import (
    PRECISIONS,
    BatchShape,
    TrainStep,
    check_precision,
    make_torch_step,
    measure,
    precision_config,
    summarise,
    torch_device,
)

from danube_jax import command_line, files
from danube_jax.config import (
    ATTENTION_BACKENDS,
    REMAT_POLICIES,
    Fp8Config,
    ModelConfig,
)
from danube_jax.config_validation import FP8_SCALINGS
from danube_jax.console import info
from danube_jax.errors import UserError
from danube_jax.models.decoder import flops_per_token, param_count
from danube_jax.training.metrics import memory_bytes, peak_flops

OURS, PEER = "danube_jax", "pytorch"
PEERS = ("auto", "none", "only")

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
_PRECISION = flags.DEFINE_list("precision", ["float32"], f"One or several of {PRECISIONS}.")
_CONTEXT = flags.DEFINE_list("context", ["512"], "Tokens in a sequence, one or several.")
_BATCH = flags.DEFINE_integer("batch", 4, "Sequences in a step, without accumulation.")
_BATCH_TOKENS = flags.DEFINE_integer(
    "batch_tokens", None, "Tokens in a step, on all devices; goes before --batch."
)
_MICROBATCH_TOKENS = flags.DEFINE_integer(
    "microbatch_tokens", None, "Tokens of a device and micro-batch; default all of its share."
)
_STEPS = flags.DEFINE_integer("steps", 3, "Steps in one repeat.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Repeats; the median is reported.")
_REMAT = flags.DEFINE_string("remat", "none", f"One of {', '.join(REMAT_POLICIES)}.")
_BACKEND = flags.DEFINE_string(
    "attention_backend", "auto", f"One of {', '.join(ATTENTION_BACKENDS)}."
)
_CHUNK = flags.DEFINE_integer(
    "loss_chunk_tokens", 8_192, "Tokens whose logits are held at once; 0 for all."
)
_SCALING = flags.DEFINE_string("fp8_scaling", "delayed", f"One of {', '.join(FP8_SCALINGS)}.")
_FAST = flags.DEFINE_list(
    "fp8_fast_accumulation",
    ["true", "true", "false"],
    "Whether FP8 matmuls for output, input gradient, weight gradient may add up with fewer bits.",
)
_PEER = flags.DEFINE_string("peer", "auto", "PyTorch: auto (where it can run), none, only.")
_PEER_COMPILE = flags.DEFINE_boolean(
    "peer_compile", None, "torch.compile for the peer; default on a GPU only."
)
_PEER_ATTENTION = flags.DEFINE_string(
    "peer_attention", "sdpa", "transformers' attn_implementation: sdpa, flash_attention_2, ..."
)
_PROFILE = flags.DEFINE_string("profile", None, "Folder for traces; also prints kernel classes.")
_ROOFLINE = flags.DEFINE_boolean("roofline", False, "Measures the parts of a step instead.")
_ISOLATE = flags.DEFINE_boolean(
    "isolate", None, "A process of its own for every case; default on a GPU, where there are more."
)
_JSON = flags.DEFINE_string("json", None, "Also writes the JSON object to this file.")


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table: who runs the step, in which precision and at which context."""

    candidate: str
    precision: str
    context: int

    def __str__(self) -> str:
        return f"{self.candidate}, {self.precision}, context {self.context:,}"


def checked_model() -> ModelConfig:
    """The model that the flags ask for.

    Raises:
      UserError: a flag has an impossible value.
    """
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


def _require_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UserError(f"--{name}={value}: expected one of {', '.join(choices)}")


def checked_lists() -> tuple[list[str], list[int], Fp8Config]:
    """Precisions, contexts, and how FP8 is scaled.

    Raises:
      UserError: a flag has an impossible value.
    """
    counts = {"batch": _BATCH.value, "steps": _STEPS.value, "repeats": _REPEATS.value}
    counts |= {"batch_tokens": _BATCH_TOKENS.value, "microbatch_tokens": _MICROBATCH_TOKENS.value}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise UserError(f"--{name}={value}: expected a positive number")
    if _CHUNK.value < 0:
        raise UserError(f"--loss_chunk_tokens={_CHUNK.value}: expected zero or a positive number")
    _require_choice("peer", _PEER.value, PEERS)
    _require_choice("fp8_scaling", _SCALING.value, FP8_SCALINGS)
    for name in _PRECISION.value:
        _require_choice("precision", name, PRECISIONS)
    contexts = []
    for text in _CONTEXT.value:
        if not text.strip().isdecimal() or int(text) < 2:
            raise UserError(f"--context={text}: expected at least 2, to predict a token")
        contexts.append(int(text))
    if not contexts or not _PRECISION.value:
        raise UserError("--context and --precision: expected at least one value each")
    fast = [text.strip().lower() for text in _FAST.value]
    if len(fast) != 3 or not set(fast) <= {"true", "false"}:
        raise UserError(
            f"--fp8_fast_accumulation={','.join(fast)}: expected three of true and false, for "
            "output, input gradient and weight gradient"
        )
    scaling = Fp8Config(
        scaling=_SCALING.value, fast_accumulation=tuple(text == "true" for text in fast)
    )
    return list(dict.fromkeys(_PRECISION.value)), list(dict.fromkeys(contexts)), scaling


def batch_shape(context: int, devices: int) -> BatchShape:
    """How a step of the flags' size is cut into micro-batches of whole sequences.

    Raises:
      UserError: it cannot be.
    """
    name = "batch" if _BATCH_TOKENS.value is None else "batch_tokens"
    tokens = _BATCH_TOKENS.value or _BATCH.value * context
    if tokens % (devices * context):
        raise UserError(
            f"--{name}={flags.FLAGS[name].value}: expected a whole number of sequences of "
            f"{context:,} tokens on each of {devices} devices"
        )
    share = tokens // devices
    micro = _MICROBATCH_TOKENS.value or share
    if micro % context or share % micro:
        raise UserError(
            f"--microbatch_tokens={micro}: expected whole sequences of {context:,} tokens that "
            f"divide a device's share of a step, {share:,} tokens"
        )
    return BatchShape(share // micro, devices * micro // context, context)


def peer_precision(precision: str) -> str:
    """What PyTorch is timed in, beside a precision of ours."""
    return "float32" if precision == "float32" else "bfloat16"


def plan_cases(precisions: Sequence[str], contexts: Sequence[int]) -> list[list[Case]]:
    """The cases, in groups that may take turns: those of one context.

    Raises:
      UserError: the peer was asked for by name and cannot run.
    """
    peers = list(dict.fromkeys(map(peer_precision, precisions)))
    refusal = peer_refusal()
    if _PEER.value == "none" or (_PEER.value == "auto" and refusal):
        if refusal and _PEER.value == "auto":
            info(f"PyTorch is left out: {refusal}")
        peers = []
    elif refusal:
        raise UserError(f"--peer={_PEER.value}: {refusal}")
    ours = [] if _PEER.value == "only" else precisions
    return [
        [Case(OURS, name, context) for name in ours] + [Case(PEER, name, context) for name in peers]
        for context in contexts
    ]


def peer_refusal() -> str | None:
    """Why PyTorch cannot be timed beside JAX, or None where it can."""
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    if jax.default_backend() == "gpu" and torch_device() != "cuda":
        return "the installed PyTorch does not see the GPU that JAX uses (a CPU build?)"
    if jax.default_backend() not in ("cpu", "gpu"):
        return f"it does not run on {jax.default_backend()}"
    return None


def run_group(config: ModelConfig, cases: Sequence[Case], fp8: Fp8Config) -> list[dict[str, Any]]:
    """Times cases of one context in turns, in this process; a row each.

    Raises:
      UserError: the device has not the memory.
    """
    devices = jax.device_count()
    shape = batch_shape(cases[0].context, devices)
    try:
        steps = {case: make_step(config, case, shape, fp8) for case in cases}
        seconds = measure(steps, _REPEATS.value, _STEPS.value)
    except Exception as error:  # of JAX or of PyTorch, which name it alike only in the text
        if not any(words in str(error) for words in ("RESOURCE_EXHAUSTED", "out of memory")):
            raise
        raise UserError(
            f"{', '.join(map(str, cases))}: out of memory with {shape.rows} x {shape.context:,} "
            "tokens a micro-batch; give a smaller --microbatch_tokens, or --remat=attention"
        ) from error
    peak = peak_flops(jax.devices()[0].device_kind)
    flops = flops_per_token(config, shape.context)
    rows = []
    for case, values in seconds.items():
        rows.append(
            dataclasses.asdict(case)
            | {"accumulation": shape.accumulation, "rows": shape.rows, "devices": devices}
            | summarise(values, shape.tokens // devices, flops, peak)
            | {"gflops_per_token": flops / 1e9, "peak_memory_bytes": None}
        )
    if len(rows) == 1:  # of several in one process, whose memory it is cannot be told
        rows[0]["peak_memory_bytes"] = peak_memory(cases[0])
    for case, row in zip(cases, rows, strict=True):
        if _PROFILE.value and case.candidate == OURS:
            folder = Path(_PROFILE.value) / f"{case.precision}-{case.context}"
            row["profile"] = profile(steps[case], steps[case].hlo(), folder)
    return rows


def make_step(config: ModelConfig, case: Case, shape: BatchShape, fp8: Fp8Config) -> Any:
    """The step of one case."""
    info(f"{case}: {shape.accumulation} x {shape.rows} x {shape.context:,} tokens")
    if case.candidate == OURS:
        return TrainStep(config, precision_config(case.precision, fp8), shape, _CHUNK.value)
    share = dataclasses.replace(shape, rows=shape.rows // jax.device_count())  # of one GPU
    return make_torch_step(
        config,
        share,
        bfloat16=case.precision == "bfloat16",
        compiled=torch_device() == "cuda" if _PEER_COMPILE.value is None else _PEER_COMPILE.value,
        attention=_PEER_ATTENTION.value,
    )


def peak_memory(case: Case) -> int | None:
    """Peak bytes of the only case of this process, or None where it is not known."""
    if case.candidate == OURS:
        return memory_bytes()
    import torch

    return torch.cuda.max_memory_allocated() if torch_device() == "cuda" else memory_bytes()


def run_isolated(case: Case) -> dict[str, Any]:
    """Times one case in a process of its own; its row, or one that says why there is none."""
    overrides = [
        f"--precision={case.precision}",
        f"--context={case.context}",
        f"--peer={'only' if case.candidate == PEER else 'none'}",
        "--noisolate",
    ]
    # JAX takes the memory of the GPU when it starts, unless it is PyTorch's turn.
    preallocate = str(case.candidate == OURS).lower()
    reason = ""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "report.json"
        process = subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:], *overrides, f"--json={output}"],
            env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": preallocate},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for line in process.stderr:
            if line.startswith("error: "):
                reason = line.removeprefix("error: ").strip()
            else:
                sys.stderr.write(line)
        if process.wait() == 0:
            return json.loads(output.read_text())["results"][0]
    reason = reason or f"its process ended with status {process.returncode}"
    info(f"{case}: {reason}")
    return dataclasses.asdict(case) | {"error": reason}


def benchmark(config: ModelConfig) -> dict[str, Any]:
    """Runs the benchmark that the flags describe on `config`; everything to report."""
    precisions, contexts, fp8 = checked_lists()
    several = len(precisions) * len(contexts) > 1 or _PEER.value == "auto"
    if _PEER.value == "only" or (several and _ISOLATE.value is not False):
        # Before JAX starts: this process leaves the GPU's memory to others.
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    for precision in precisions:
        check_precision(precision, config)
    for context in contexts:
        batch_shape(context, jax.device_count())
    if _ROOFLINE.value:
        return benchmark_parts(config, precisions, contexts)
    groups = plan_cases(precisions, contexts)
    isolate = _ISOLATE.value
    if isolate is None:
        isolate = jax.default_backend() == "gpu" and sum(map(len, groups)) > 1
    rows: list[dict[str, Any]] = []
    for group in groups:
        rows += map(run_isolated, group) if isolate else run_group(config, group, fp8)
    peak = peak_flops(jax.devices()[0].device_kind)
    return machine(torch=any(row["candidate"] == PEER for row in rows)) | {
        "model": dataclasses.asdict(config),
        "parameters": param_count(config),
        "fp8": dataclasses.asdict(fp8),
        "steps": _STEPS.value,
        "repeats": _REPEATS.value,
        "results": with_speedups(rows),
        "peak_tflops": peak / 1e12 if peak else None,
    }


def benchmark_parts(
    config: ModelConfig, precisions: Sequence[str], contexts: Sequence[int]
) -> dict[str, Any]:
    """The parts of a step on one device, at the size of a micro-batch."""
    tokens = _MICROBATCH_TOKENS.value or _BATCH_TOKENS.value or _BATCH.value * contexts[0]
    parts = roofline(
        config,
        tokens=tokens,
        precisions=precisions,
        contexts=contexts,
        repeats=_REPEATS.value,
        steps=_STEPS.value,
        on_case=info,
    )
    return machine(torch=False) | {"model": dataclasses.asdict(config), "tokens": tokens} | parts


def with_speedups(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, ours with `speed_over_pytorch`: tokens/s a device over those of the peer."""
    peers = {
        (row["precision"], row["context"]): row["tokens_per_second"]
        for row in rows
        if row["candidate"] == PEER and "error" not in row
    }
    out = []
    for row in rows:
        peer = peers.get((peer_precision(row["precision"]), row["context"]))
        if row["candidate"] == OURS and "error" not in row and peer is not None:
            row = row | {"speed_over_pytorch": row["tokens_per_second"] / peer}
        out.append(row)
    return out


def machine(*, torch: bool) -> dict[str, Any]:
    """Where and when something was measured, with the versions of what took part."""
    packages = ["jax", "jaxlib", "flax", "optax", *(["torch", "transformers"] if torch else [])]
    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "date": datetime.date.today().isoformat(),
    }


COLUMNS = (
    ("ms/step", 10, lambda row: f"{row['ms_per_step']:.1f}"),
    ("min", 10, lambda row: f"{row['ms_per_step_min']:.1f}"),
    ("max", 10, lambda row: f"{row['ms_per_step_max']:.1f}"),
    ("tokens/s", 11, lambda row: f"{row['tokens_per_second']:,.0f}"),
    ("TFLOP/s", 10, lambda row: f"{row['tflops']:.3f}"),
    ("MFU", 8, lambda row: "-" if row["mfu"] is None else f"{row['mfu']:.1%}"),
    ("peak GiB", 10, lambda row: _gibibytes(row["peak_memory_bytes"])),
    ("x PyTorch", 11, lambda row: _ratio(row.get("speed_over_pytorch"))),
)


def _gibibytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**30:.2f}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def print_table(report: dict[str, Any]) -> None:
    """The report for people; speeds are those of one device."""
    print(
        f"{_MODEL.value}: {report['parameters']:,} parameters, "
        f"{report['devices']} x {report['device']}"
    )
    print(f"{'':<12}{'precision':<11}{'context':>8}", end="")
    print("".join(f"{title:>{width}}" for title, width, _ in COLUMNS))
    for row in report["results"]:
        print(f"{row['candidate']:<12}{row['precision']:<11}{row['context']:>8,}", end="")
        if "error" in row:
            print(f"  {row['error']}")
        else:
            print("".join(f"{written(row):>{width}}" for _, width, written in COLUMNS))
    peak = report["peak_tflops"]
    against = f"{peak:,.1f} TFLOP/s, dense bfloat16" if peak else "not known for this device"
    print(f"MFU = tokens/s x model FLOPs a token / the device's peak ({against})")
    for row in report["results"]:
        if "profile" in row:
            print(f"\n{row['candidate']}, {row['precision']}, context {row['context']:,}")
            print_profile(row["profile"])


def main(argv: Sequence[str]) -> int:
    """Checks the flags, measures, reports; returns the exit status."""
    command_line.parse_flags(argv, __doc__)
    report = benchmark(checked_model())
    if _ROOFLINE.value:
        print(f"{_MODEL.value}, {report['tokens']:,} tokens, {report['device']}\n")
        print_roofline(report)
    else:
        print_table(report)
    print(json.dumps(report))
    if _JSON.value:
        files.write_json(_JSON.value, report)
    return int(all("error" in row for row in report.get("results", [{}])))


if __name__ == "__main__":
    # As the trainer: JAX's own default leaves a quarter of a GPU unused.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    command_line.run(main)
