"""Times generation: prefill and decoding at several batch sizes, greedy, with a KV cache.

Example:
  python tools/bench_generate.py --size=16m --batch=1,8,32
  python tools/bench_generate.py --model=HF_DIR --prompt_tokens=256 --new_tokens=64

Where PyTorch and transformers are installed, the same weights generate there too (`generate`,
greedy, SDPA attention), the two taking turns so that a busy machine disturbs both alike; the table
says whether both gave the same tokens. --peer=none leaves it out. Prompts are random tokens, all of
one length, and weights of --size are random. Prints a table and one JSON object.

Prefill is the time to the first token: a call that makes one new token, from token ids on the host
to the new one on the host. Decoding is what a call with all new tokens takes beyond that, divided
by the tokens after the first. Compilation is not counted; it happens once a shape.
"""

import dataclasses
import datetime
import importlib.metadata
import importlib.util
import json
import os
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
from danube_jax.config import ModelConfig
from danube_jax.errors import UserError
from danube_jax.inference.generate import Generator
from danube_jax.inference.sampling import SamplingConfig
from danube_jax.interop.hf_config import export_config
from danube_jax.interop.hf_weights import params_to_hf
from danube_jax.interop.model_source import open_model
from danube_jax.models.decoder import init_params, param_count

SIZES = {
    **SMALL_MODELS,
    "135m": ModelConfig(  # the shape of SmolLM2-135M
        model_type="llama",
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1_536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8_192,
        rope_theta=100_000.0,
        tie_word_embeddings=True,
    ),
    "danube": ModelConfig(sliding_window=4_096, max_position_embeddings=16_384),
}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

_SIZE = flags.DEFINE_string("size", "16m", f"Random weights of a size: {', '.join(SIZES)}.")
_MODEL = flags.DEFINE_string("model", None, "A Hugging Face folder instead of --size.")
_BATCH = flags.DEFINE_list("batch", ["1", "8", "32"], "Prompts at once, several sizes.")
_PROMPT = flags.DEFINE_integer("prompt_tokens", 128, "Tokens of each prompt.")
_NEW = flags.DEFINE_integer("new_tokens", 64, "New tokens of each prompt.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Repeats; the median is reported.")
_DTYPE = flags.DEFINE_string("dtype", "float32", f"{' or '.join(DTYPES)}.")
_PEER = flags.DEFINE_string("peer", "auto", "auto (transformers where it is installed) or none.")
_THREADS = flags.DEFINE_integer("threads", 0, "PyTorch's threads; 0: one a CPU core, as JAX.")
_JSON = flags.DEFINE_string("json", None, "Also writes the JSON object to this file.")

Generate = Callable[[np.ndarray, int], list[list[int]]]
"""From prompts [batch, tokens] and a number of new tokens to the new tokens."""


def make_ours(config: ModelConfig, params: Any, dtype: jnp.dtype) -> Generate:
    """The project's own engine."""
    generator = Generator(config, params, dtype=dtype)

    def generate(prompts: np.ndarray, new_tokens: int) -> list[list[int]]:
        completions = generator.generate(prompts.tolist(), SamplingConfig(max_tokens=new_tokens))
        return [list(completion.tokens) for (completion,) in completions]

    return generate


def make_transformers(config: ModelConfig, params: Any, dtype: str, threads: int) -> Generate:
    """transformers with the same weights; SDPA attention and its default (dynamic) cache."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(threads or os.cpu_count())
    device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
    content = export_config(config, dtype="float32", bos_id=None, eos_id=None, pad_id=None)
    hf_config = transformers.AutoConfig.for_model(**content)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(hf_config)
    state = {name: torch.from_numpy(array) for name, array in params_to_hf(params, config)}
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    # Buffers, such as the frequencies of RoPE, have no place in a state dict.
    model.model.rotary_emb = type(model.model.rotary_emb)(hf_config)
    model = model.to(device, getattr(torch, dtype)).eval()

    def generate(prompts: np.ndarray, new_tokens: int) -> list[list[int]]:
        tokens = torch.from_numpy(prompts.astype(np.int64)).to(device)
        with torch.inference_mode():
            output = model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        return output[:, tokens.shape[1] :].tolist()

    return generate


def measure(
    candidates: dict[str, Generate], prompts: np.ndarray, new_tokens: int, repeats: int
) -> dict[str, dict[str, Any]]:
    """Figures of each candidate at one batch size, the candidates taking turns."""
    tokens = {}
    for name, generate in candidates.items():  # compiles and warms up
        generate(prompts, 1)
        tokens[name] = generate(prompts, new_tokens)
    seconds = {name: {"first": [], "all": []} for name in candidates}
    for _ in range(repeats):
        for key, count in (("first", 1), ("all", new_tokens)):
            for name, generate in candidates.items():
                start = time.perf_counter()
                generate(prompts, count)
                seconds[name][key].append(time.perf_counter() - start)
    return {
        name: {"tokens": tokens[name], **summarise(times, prompts.shape, new_tokens)}
        for name, times in seconds.items()
    }


def summarise(
    seconds: dict[str, list[float]], shape: tuple[int, int], new_tokens: int
) -> dict[str, float]:
    """Latency and throughput from the times of calls for one and for all new tokens."""
    batch, prompt_tokens = shape
    first = statistics.median(seconds["first"])
    decode = statistics.median(
        [whole - one for whole, one in zip(seconds["all"], seconds["first"], strict=True)]
    ) / (new_tokens - 1)
    return {
        "first_token_ms": 1e3 * first,
        "first_token_ms_min": 1e3 * min(seconds["first"]),
        "first_token_ms_max": 1e3 * max(seconds["first"]),
        "prefill_tokens_per_second": batch * prompt_tokens / first,
        "ms_per_token": 1e3 * decode,
        "decode_tokens_per_second": batch / decode,
        "total_ms": 1e3 * statistics.median(seconds["all"]),
        "total_ms_min": 1e3 * min(seconds["all"]),
        "total_ms_max": 1e3 * max(seconds["all"]),
    }


def read_flags() -> tuple[list[int], str]:
    """Batch sizes and what to call the model.

    Raises:
      UserError: a flag has an impossible value.
    """
    choices = {"dtype": (_DTYPE.value, DTYPES), "peer": (_PEER.value, ("auto", "none"))}
    if _MODEL.value is None:
        choices["size"] = (_SIZE.value, SIZES)
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise UserError(f"--{name}={value}: expected one of {', '.join(allowed)}")
    least = {"prompt_tokens": 1, "new_tokens": 2, "repeats": 1, "threads": 0}
    for name, low in least.items():
        if flags.FLAGS[name].value < low:
            raise UserError(f"--{name}={flags.FLAGS[name].value}: expected at least {low}")
    if not all(text.isdecimal() and int(text) for text in _BATCH.value):
        raise UserError(f"--batch={','.join(_BATCH.value)}: expected numbers such as 1,8,32")
    name = _SIZE.value if _MODEL.value is None else Path(_MODEL.value).name
    return [int(text) for text in _BATCH.value], name


def benchmark(batches: Sequence[int], name: str) -> dict[str, Any]:
    """Runs what the flags describe; everything to report."""
    if _MODEL.value is None:
        config = SIZES[_SIZE.value]
        params = init_params(config, jax.random.key(0))
    else:
        source = open_model(_MODEL.value)
        config, params = source.config, source.load_params(jnp.float32)
    candidates = {"danube_jax": make_ours(config, params, DTYPES[_DTYPE.value])}
    packages = ["jax", "jaxlib", "flax"]
    if _PEER.value == "auto" and importlib.util.find_spec("torch"):
        peer = make_transformers(config, params, _DTYPE.value, _THREADS.value)
        candidates["transformers"] = peer
        packages += ["torch", "transformers"]
    rng = np.random.default_rng(0)
    rows = []
    for batch in batches:
        prompts = rng.integers(0, config.vocab_size, (batch, _PROMPT.value), dtype=np.int32)
        results = measure(candidates, prompts, _NEW.value, _REPEATS.value)
        tokens = [result.pop("tokens") for result in results.values()]
        row = {"batch": batch, "results": results}
        if len(tokens) == 2:
            ours, theirs = results.values()
            row["same_tokens"] = tokens[0] == tokens[1]
            row["speed_over_transformers"] = {
                key: theirs[key] / ours[key] for key in ("first_token_ms", "ms_per_token")
            }
        rows.append(row)
        print_rows(row)
    return {
        "name": name,
        "model": dataclasses.asdict(config),
        "parameters": param_count(config),
        "dtype": _DTYPE.value,
        "prompt_tokens": _PROMPT.value,
        "new_tokens": _NEW.value,
        "repeats": _REPEATS.value,
        "batches": rows,
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "date": datetime.date.today().isoformat(),
    }


def print_header(name: str) -> None:
    """What is measured, and the table's first line."""
    print(
        f"{name}, {_DTYPE.value}, prompts of {_PROMPT.value} tokens, {_NEW.value} new ones, "
        f"{jax.devices()[0].device_kind}; medians of {_REPEATS.value}"
    )
    heads = ("first token ms", "prefill tok/s", "ms/token", "decode tok/s")
    print(f"{'batch':>5} {'':<13}" + "".join(f"{head:>16}" for head in heads))


def print_rows(row: dict[str, Any]) -> None:
    """One batch size, for people."""
    for name, result in row["results"].items():
        print(
            f"{row['batch']:>5} {name:<13}{result['first_token_ms']:>16.1f}"
            f"{result['prefill_tokens_per_second']:>16,.0f}{result['ms_per_token']:>16.2f}"
            f"{result['decode_tokens_per_second']:>16,.0f}"
        )
    if "same_tokens" in row:
        speed = row["speed_over_transformers"]
        same = "same tokens" if row["same_tokens"] else "DIFFERENT tokens"
        print(
            f"{row['batch']:>5} {'speed':<13}{speed['first_token_ms']:>15.2f}x"
            f"{'':>16}{speed['ms_per_token']:>15.2f}x   {same}",
            flush=True,
        )


def main(argv: Sequence[str]) -> int:
    """Checks the flags, measures, reports; returns the exit status."""
    command_line.parse_flags(argv, __doc__)
    batches, name = read_flags()
    print_header(name)
    report = benchmark(batches, name)
    print(json.dumps(report))
    if _JSON.value:
        files.write_json(_JSON.value, report)
    return 0


if __name__ == "__main__":
    command_line.run(main)
