"""Hugging Face's config.json and generation_config.json, to and from `ModelConfig`.

Llama and Mistral describe the same decoder; they differ in one thing, Mistral's sliding window, and
in the defaults that stand in for keys that a config.json leaves out. `DEFAULTS` holds those of
`transformers`, so that a folder means here what it means there.
"""

import json
import math
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from danube_jax.config import ModelConfig, parse_model_config
from danube_jax.errors import UserError
from danube_jax.untrusted import parse_json, refuse_misspelt

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
# Keys of generation_config.json that bear on us, and others that look like them.
GENERATION_KEYS = (
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"),
    *("max_new_tokens", "bos_token_id", "eos_token_id", "pad_token_id", "top_h"),
)
ARCHITECTURES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral"}

_SHARED_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 4_096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "head_dim": None,  # hidden_size / num_attention_heads
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _SHARED_DEFAULTS
    | {
        "intermediate_size": 11_008,
        "num_key_value_heads": None,  # num_attention_heads
        "max_position_embeddings": 2_048,
    },
    "mistral": _SHARED_DEFAULTS
    | {
        "intermediate_size": 14_336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "sliding_window": 4_096,
    },
}
ROPE_THETA = 10_000.0
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)

# Features of Llama-like models that the decoder lacks, and what a config.json may say of them.
_LACKING: dict[str, tuple[Any, ...]] = {
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "qkv_bias": (None, False),
    "use_bias": (None, False),
    "quantization_config": (None, {}),
    "pretraining_tp": (None, 0, 1),
    "partial_rotary_factor": (None, 1, 1.0),
    "num_local_experts": (None, 0),
    "num_experts": (None, 0),
    "qk_norm": (None, False),
    "use_qk_norm": (None, False),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "no_rope_layers": (None, []),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
    "auto_map": (None, {}),
}


_KNOWN = {
    *(key for defaults in DEFAULTS.values() for key in defaults),
    *_LACKING,
    *("architectures", "model_type", "layer_types", "sliding_window"),
    *("rope_theta", "rope_scaling", "rope_parameters"),
}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      UserError: it is missing, unreadable or holds something else.
    """
    try:
        content = parse_json(path.read_bytes(), strict=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path}: damaged JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds {type(content).__name__}; expected a JSON object")
    return content


def read_config(folder: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The decoder that a Hugging Face folder describes, and its config.json as it stands.

    Raises:
      UserError: no config.json, or a model that the decoder cannot compute; names the feature.
    """
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise UserError(
            f"{folder}: no {CONFIG_FILE}; expected a Hugging Face model folder "
            "(config.json, safetensors or .bin weights, tokenizer files)"
        )
    content = read_json(path)
    return model_config(content, str(path)), content


def model_config(content: Mapping[str, Any], where: str) -> ModelConfig:
    """`ModelConfig` of a config.json.

    Args:
      content: its keys; one that is absent has the default that `transformers` gives it.
      where: name of the file, for messages.

    Raises:
      UserError: the architecture or a feature is not ours, or a value is impossible.
    """
    refuse_misspelt(content, _KNOWN, where)
    model_type = _model_type(content, where)
    _refuse_lacking(content, where)
    values = {key: content.get(key, default) for key, default in DEFAULTS[model_type].items()}
    if values["hidden_act"] != "silu":
        raise _unsupported(where, "hidden_act", values["hidden_act"], "silu")
    if values["num_key_value_heads"] is None:
        values["num_key_value_heads"] = values["num_attention_heads"]
    for key in _SIZES:
        value = values[key]
        fine = isinstance(value, int) and not isinstance(value, bool) and value > 0
        if not fine and not (key == "head_dim" and value is None):
            raise UserError(f"{where}: {key} is {value!r}; expected a positive whole number")
    window = _sliding_window(content, values.get("sliding_window"), model_type, where)
    heads, hidden = values["num_attention_heads"], values["hidden_size"]
    head_dim = values["head_dim"]
    fields = {key: values[key] for key in _SIZES} | {
        "model_type": model_type,
        # Stated only where it says something, as in our own config files.
        "head_dim": None if head_dim == hidden / heads else head_dim,
        "sliding_window": window,
        "rope_theta": _rope_theta(content, where),
        "rms_norm_eps": values["rms_norm_eps"],
        "initializer_range": values["initializer_range"],
        "tie_word_embeddings": values["tie_word_embeddings"],
    }
    try:
        return parse_model_config(fields)
    except UserError as error:
        raise UserError(f"{where}: {str(error).removeprefix('config.model.')}") from None


def _unsupported(where: str, key: str, value: Any, expected: str) -> UserError:
    text = json.dumps(value, ensure_ascii=False)
    text = text if len(text) < 80 else text[:77] + "..."
    return UserError(f"{where}: {key}={text} is not supported; expected {expected}")


def _model_type(content: Mapping[str, Any], where: str) -> str:
    architectures = content.get("architectures") or []
    model_type = content.get("model_type")
    if not model_type and not architectures:
        raise UserError(
            f"{where}: neither model_type nor architectures; expected the config of a "
            "Llama or Mistral model"
        )
    known = ", ".join(ARCHITECTURES)
    if not isinstance(architectures, list):
        raise _unsupported(where, "architectures", architectures, f"a list of one of {known}")
    for name in architectures:
        if not isinstance(name, str) or name not in ARCHITECTURES:
            raise _unsupported(where, "architectures", name, f"one of {known}")
    if model_type and (not isinstance(model_type, str) or model_type not in DEFAULTS):
        raise _unsupported(where, "model_type", model_type, "llama or mistral")
    if architectures:
        named = ARCHITECTURES[architectures[0]]
        if model_type and model_type != named:
            raise UserError(
                f"{where}: model_type={model_type!r} and architectures={architectures[0]!r} "
                "contradict each other; expected the same family"
            )
        model_type = named
    return str(model_type)


def _refuse_lacking(content: Mapping[str, Any], where: str) -> None:
    for key, allowed in _LACKING.items():
        value = content.get(key)
        if not any(value == item and type(value) is type(item) for item in allowed):
            expected = " or ".join(json.dumps(item) for item in allowed if item is not None)
            raise _unsupported(where, key, value, f"{expected or 'null'}, or no such key")


def _sliding_window(
    content: Mapping[str, Any], window: Any, model_type: str, where: str
) -> int | None:
    if model_type == "llama":
        stated = content.get("sliding_window")
        if stated is not None:
            raise UserError(
                f"{where}: sliding_window={stated!r} with model_type 'llama', which has none; "
                "expected null, or model_type 'mistral'"
            )
    whole = isinstance(window, int) and not isinstance(window, bool) and window > 0
    if window is not None and not whole:
        raise UserError(f"{where}: sliding_window is {window!r}; expected null or a positive size")
    wanted = "full_attention" if window is None else "sliding_attention"
    layer_types = content.get("layer_types")
    fine = isinstance(layer_types, list) and layer_types and all(t == wanted for t in layer_types)
    if layer_types is not None and not fine:
        raise _unsupported(where, "layer_types", layer_types, f"every layer {wanted}")
    return window


_ROPE_KEYS = ("rope_theta", "rope_type", "partial_rotary_factor")


def _rope_theta(content: Mapping[str, Any], where: str) -> float:
    theta = content.get("rope_theta", None)
    for key in ("rope_scaling", "rope_parameters"):
        rope = content.get(key)
        if rope is None:
            continue
        if not isinstance(rope, Mapping) or any(isinstance(v, Mapping) for v in rope.values()):
            raise _unsupported(where, key, rope, "one set of RoPE parameters for all layers")
        refuse_misspelt(rope, _ROPE_KEYS, f"{where}: {key}")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", None):
            raise _unsupported(where, f"{key}.rope_type", kind, "default (no RoPE scaling)")
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            factor = rope["partial_rotary_factor"]
            raise _unsupported(where, f"{key}.partial_rotary_factor", factor, "1.0")
        stated = rope.get("rope_theta")
        if stated is not None:
            if theta is not None and theta != stated:
                raise UserError(
                    f"{where}: rope_theta={theta!r} and {key}.rope_theta={stated!r} contradict "
                    "each other; expected one value"
                )
            theta = stated
    theta = ROPE_THETA if theta is None else theta
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not 0 < theta < math.inf:
        raise UserError(f"{where}: rope_theta is {theta!r}; expected a positive number")
    return float(theta)


def architecture(config: ModelConfig) -> str:
    """'llama' or 'mistral': what a model is exported as.

    It is `model_type`, except that a Llama has no sliding window: a windowed model is exported as
    Mistral, which computes the same apart from it.
    """
    return "mistral" if config.sliding_window is not None else config.model_type


def export_config(
    config: ModelConfig,
    *,
    dtype: str,
    bos_id: int | None,
    eos_id: int | list[int] | None,
    pad_id: int | None,
) -> dict[str, Any]:
    """The config.json of an exported model.

    RoPE and dtype are stated under the names of transformers 4 (`rope_theta`, `torch_dtype`), which
    vLLM and llama.cpp read too, and under those of transformers 5 (`rope_parameters`, `dtype`).

    Args:
      config: the model.
      dtype: dtype of the tensors, 'bfloat16', 'float16' or 'float32'.
      bos_id, eos_id, pad_id: special tokens; None where there is none.
    """
    model_type = architecture(config)
    name = {kind: architecture for architecture, kind in ARCHITECTURES.items()}[model_type]
    theta = int(config.rope_theta) if config.rope_theta.is_integer() else config.rope_theta
    content: dict[str, Any] = {
        "architectures": [name],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "sliding_window": config.sliding_window,
        "rope_theta": theta,
        "rope_scaling": None,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": config.initializer_range,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
        "pretraining_tp": 1,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
        "transformers_version": metadata.version("transformers"),
    }
    if model_type == "llama":
        content["mlp_bias"] = False
    return content


def export_generation_config(content: Mapping[str, Any]) -> dict[str, Any]:
    """The generation_config.json that goes with an exported config.json."""
    keys = ("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version")
    return {key: content[key] for key in keys if content[key] is not None}
