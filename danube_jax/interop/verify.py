"""Checks an exported folder by loading it with transformers and comparing with the checkpoint.

Legend: B rows, T tokens, V vocabulary.
"""

import contextlib
import dataclasses
import functools
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from danube_jax.config import ModelConfig
from danube_jax.console import info
from danube_jax.data.tokenizer import Tokenizer
from danube_jax.errors import RunError
from danube_jax.interop import hf_config
from danube_jax.interop.model_source import ModelSource
from danube_jax.models.decoder import Decoder
from danube_jax.models.lora import merge

ROWS, LENGTH = 2, 64
WINDOW_CHECKED = 512  # a window up to this is passed by the batch

# Two float32 programs that sum in another order differ by about 1e-6 of the logits a layer; a
# mistaken tensor, RoPE or norm changes them by tens of per cent.
LOGIT_TOLERANCE = 1e-3  # of the largest logit, at least of 1
KL_TOLERANCE = 1e-5  # nats a token

HARD_TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    " leading and  double   spaces, trailing ",
    "line\nbreaks\r\n\n\ttabs\t\tand\n  indents",
    "numbers 1234567890, 3.14159, -2e10; URLs https://example.org/?q=a%20b#c",
    "naïve café \N{EN DASH} “quotes” … ½ ñ ß Ω",
    "日本語と中文, 한국어, العربية, עברית, हिन्दी",
    "emoji 🙂👩‍👩‍👧‍👦🏳️‍🌈 and controls \x00\x01\x7f\u200b\ufeff",
    "def f(x):\n    return {'a': [x ** 2 for _ in range(10)]}  # code",
    "",
    " ",
)
CHAT = (
    {"role": "user", "content": "Why is drinking water so healthy?"},
    {"role": "assistant", "content": "Because the body needs it."},
    {"role": "user", "content": "How much?"},
)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Logits of transformers on the exported folder beside ours, all computed in float32.

    Attributes:
      max_difference: largest difference of a logit, both from the exported dtype's values.
      kl: mean KL divergence, nats a token, of the same.
      dtype_max_difference: the same against the checkpoint's own values.
      dtype_kl: its KL divergence: what the exported dtype costs.
      tokens: how many were compared.
      texts: on how many texts the tokenizers gave the same ids.
    """

    max_difference: float
    kl: float
    dtype_max_difference: float
    dtype_kl: float
    tokens: int
    texts: int


def fixed_tokens(config: ModelConfig) -> np.ndarray:
    """The batch of the check, int32 [B, T]: random ids that pass a small window's edge."""
    length = LENGTH
    if config.sliding_window and config.sliding_window <= WINDOW_CHECKED:
        length = max(length, config.sliding_window + LENGTH // 2)
    length = min(length, config.max_position_embeddings)
    rng = np.random.default_rng(0)
    return rng.integers(0, config.vocab_size, (ROWS, length), dtype=np.int32)


@functools.partial(jax.jit, static_argnums=0)
def _logits(decoder: Decoder, params: Any, tokens_BT: jax.Array) -> jax.Array:
    return decoder.apply({"params": params}, tokens_BT)


def our_logits(config: ModelConfig, params: Any, tokens_BT: np.ndarray) -> np.ndarray:
    """Logits float32 [B, T, V], computed in float32."""
    config = dataclasses.replace(config, attention_backend="xla", remat="none", scan_layers=False)
    with jax.default_matmul_precision("highest"):
        return np.asarray(_logits(Decoder(config), params, tokens_BT))


def compare(ours_BTV: np.ndarray, theirs_BTV: np.ndarray) -> tuple[float, float]:
    """The largest difference of a logit, and KL(ours || theirs) in nats a token, in float64."""
    ours_BTV, theirs_BTV = (x.astype(np.float64) for x in (ours_BTV, theirs_BTV))
    log_p, log_q = (_log_softmax(x) for x in (ours_BTV, theirs_BTV))
    kl = float(np.mean(np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)))
    return float(np.max(np.abs(ours_BTV - theirs_BTV))), kl


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.sum(np.exp(x), axis=-1, keepdims=True))


def verify_model(
    folder: Path, source: ModelSource, tokenizer: Tokenizer | None, dtype: str
) -> Comparison:
    """Compares an exported folder with the checkpoint that it was made from.

    Args:
      folder: the exported folder.
      source: the checkpoint.
      tokenizer: what was exported, or None.
      dtype: of the exported weights, or 'stored'.

    Raises:
      RunError: transformers reads something else than what the checkpoint holds.
    """
    info("checking what was written with transformers")
    _check_config(folder, source.config)
    texts = _check_tokenizer(folder, tokenizer) if tokenizer is not None else 0
    tokens_BT = fixed_tokens(source.config)
    own, rounded = _our_two(source, dtype, tokens_BT)
    theirs = _transformers_logits(folder, tokens_BT)
    return _judge(own, rounded, theirs, tokens_BT.size, texts)


def verify_adapter(
    folder: Path, base_folder: Path, source: ModelSource, tokenizer: Tokenizer | None, dtype: str
) -> Comparison:
    """Compares an exported adapter on its base, run by PEFT, with the LoRA checkpoint.

    Args:
      folder: the exported adapter.
      base_folder: its base as a Hugging Face folder, in the dtype that the base is stored in.
      source: the LoRA checkpoint.
      tokenizer: what was exported, or None.
      dtype: of the exported adapter, or 'stored'.

    Raises:
      RunError: PEFT computes something else, or the tokenizer gives other ids.
    """
    info("checking what was written with PEFT")
    texts = _check_tokenizer(folder, tokenizer) if tokenizer is not None else 0
    tokens_BT = fixed_tokens(source.config)
    assert source.base is not None
    assert source.lora is not None
    base = jax.tree.map(lambda x: x.astype(jnp.float32), source.base.load_params())
    adapters, _ = source.adapters()
    kept = jnp.float32 if dtype == "stored" else jnp.dtype(dtype)
    rounded = jax.tree.map(lambda x: x.astype(kept).astype(jnp.float32), adapters)
    own, written = (
        our_logits(source.config, merge(base, tree, source.lora, source.config), tokens_BT)
        for tree in (adapters, rounded)
    )
    theirs = _transformers_logits(base_folder, tokens_BT, adapter=folder)
    return _judge(own, written, theirs, tokens_BT.size, texts)


def _our_two(
    source: ModelSource, dtype: str, tokens_BT: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Our logits from the checkpoint's own values, and from these rounded to `dtype`."""
    config = source.config
    merged = source.lora is not None  # summed in float32, and rounded once
    params = source.load_params(jnp.float32 if merged else None)
    own = our_logits(config, params, tokens_BT)
    if dtype != "stored":
        rounded = jax.tree.map(lambda x: x.astype(dtype), params)
    else:
        rounded = source.load_params() if merged else params
    before, after = ([x.dtype for x in jax.tree.leaves(tree)] for tree in (params, rounded))
    del params
    return own, own if before == after else our_logits(config, rounded, tokens_BT)


def _judge(
    own: np.ndarray, rounded: np.ndarray, theirs: np.ndarray, tokens: int, texts: int
) -> Comparison:
    difference, kl = compare(rounded, theirs)
    tolerance = LOGIT_TOLERANCE * max(1.0, float(np.max(np.abs(rounded))))
    if not np.isfinite(own).all():
        raise RunError("the checkpoint's own logits are not finite; nothing was kept")
    if not (difference <= tolerance and abs(kl) <= KL_TOLERANCE):
        raise RunError(
            f"transformers computes other logits from what was written: largest difference "
            f"{difference:.3g} (allowed {tolerance:.3g}), KL {kl:.3g} nats (allowed "
            f"{KL_TOLERANCE:g}); nothing was kept"
        )
    dtype_difference, dtype_kl = compare(own, theirs)
    return Comparison(difference, kl, dtype_difference, dtype_kl, tokens, texts)


def _check_config(folder: Path, config: ModelConfig) -> None:
    written, _ = hf_config.read_config(folder)
    for field in dataclasses.fields(config):
        if field.name in ("attention_backend", "remat", "scan_layers", "model_type", "head_dim"):
            continue
        ours, theirs = getattr(config, field.name), getattr(written, field.name)
        if ours != theirs:
            raise RunError(f"{folder}: {field.name} reads {theirs!r}; expected {ours!r}")
    if written.head_size != config.head_size:
        raise RunError(f"{folder}: head_dim reads {written.head_size}, not {config.head_size}")


def _check_tokenizer(folder: Path, tokenizer: Tokenizer) -> int:
    """The number of texts on which transformers' tokenizer gives our ids."""
    from transformers import AutoTokenizer

    with _quiet():
        try:
            theirs = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:
            raise RunError(
                f"transformers cannot load the tokenizer that was written: {_one_line(error)}"
            ) from error
    for text in HARD_TEXTS:
        with _quiet():
            found = theirs(text)["input_ids"]
        ours = tokenizer.encode_prompt(text)
        if list(found) != list(ours):
            raise RunError(
                f"transformers' tokenizer gives {found[:12]} for {text[:40]!r} where ours gives "
                f"{ours[:12]}; nothing was kept"
            )
    if tokenizer.chat_template is not None:
        ours = tokenizer.encode_chat(CHAT)
        found = theirs.apply_chat_template(
            list(CHAT), add_generation_prompt=True, tokenize=True, return_dict=False
        )
        if list(found) != list(ours):
            raise RunError("transformers renders another chat than we do; nothing was kept")
    return len(HARD_TEXTS)


def _transformers_logits(
    folder: Path, tokens_BT: np.ndarray, adapter: Path | None = None
) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    with _quiet():
        try:
            model, loading = AutoModelForCausalLM.from_pretrained(
                str(folder),
                dtype=torch.float32,
                attn_implementation="eager",
                local_files_only=True,
                output_loading_info=True,
            )
        except Exception as error:
            raise RunError(
                f"transformers cannot load what was written: {_one_line(error)}"
            ) from error
        for kind, names in loading.items():
            if names and kind != "error_msgs":
                raise RunError(f"transformers reports {kind}: {sorted(map(str, names))[:3]}")
        if adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, str(adapter))
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens_BT.astype(np.int64))).logits
    return logits.numpy()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers' progress bars and notes off the terminal."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()


def describe(comparison: Comparison, dtype: str) -> str:
    """One line for the terminal."""
    line = (
        f"checked on {comparison.tokens} tokens: largest difference of a logit "
        f"{comparison.max_difference:.2e}, KL {max(0.0, comparison.kl):.2e} nats"
    )
    if not math.isclose(comparison.dtype_kl, comparison.kl, abs_tol=1e-12):
        line += (
            f"; {dtype} against the checkpoint's own dtype: {comparison.dtype_max_difference:.2e}, "
            f"KL {max(0.0, comparison.dtype_kl):.2e} nats"
        )
    if comparison.texts:
        line += f"; tokenizer: same ids on {comparison.texts} texts"
    return line
