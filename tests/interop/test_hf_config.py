"""config.json: published ones, transformers' defaults and both spellings, what is refused."""

import dataclasses
import importlib.util
import json

import pytest
import transformers
from helpers import ROOT

from danube_jax.config import ModelConfig, parse_config
from danube_jax.errors import UserError
from danube_jax.interop import hf_config

# config.json of the published checkpoints, without the fields that describe a file or a library.
_DANUBE_1_8B = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "initializer_range": 0.02,
    "intermediate_size": 6912,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 32000,
    "architectures": ["MistralForCausalLM"],
    "rope_theta": 10000.0,
    "attention_dropout": 0.0,
    "pad_token_id": 0,
}
_DANUBE3 = _DANUBE_1_8B | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "max_position_embeddings": 8192,
    "sliding_window": None,
    "rope_theta": 100000,
}
PUBLISHED = {
    "danube": _DANUBE_1_8B
    | {
        "max_position_embeddings": 16384,
        "sliding_window": 4096,
        "pretraining_tp": 1,
        "rope_scaling": None,
    },
    "danube2": _DANUBE_1_8B | {"max_position_embeddings": 8192, "sliding_window": None},
    "danube3_500m": _DANUBE3
    | {
        "hidden_size": 1536,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 16,
    },
    "danube3_4b": _DANUBE3
    | {
        "hidden_size": 3840,
        "intermediate_size": 10240,
        "head_dim": 120,
        "initializer_range": 0.01,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "rope_scaling": None,
    },
}
SPECIAL = {"bos_id": 1, "eos_id": 2, "pad_id": 0}


def our_config(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return parse_config(module.get_config()).model


@pytest.mark.parametrize("name", PUBLISHED)
def test_export_of_our_configs_is_the_published_config(name):
    written = hf_config.export_config(our_config(name), dtype="bfloat16", **SPECIAL)
    assert {key: written[key] for key in PUBLISHED[name]} == PUBLISHED[name]
    head_sizes = {"danube": 80, "danube2": 80, "danube3_500m": 96, "danube3_4b": 120}
    assert written["head_dim"] == head_sizes[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_import_of_the_published_config_is_ours(name):
    ours = our_config(name)
    ours = dataclasses.replace(ours, head_dim=None, attention_backend="auto", remat="none")
    content = dict(PUBLISHED[name])
    if name == "danube":
        del content["rope_theta"]  # the base checkpoint's config leaves it to the class
    assert hf_config.model_config(content, "config.json") == ours


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
@pytest.mark.parametrize("absent", [True, False], ids=["absent", "stated"])
def test_defaults_are_those_of_transformers(model_type, absent):
    theirs = transformers.AutoConfig.for_model(model_type)
    content = {"model_type": model_type} if absent else theirs.to_dict()
    ours = hf_config.model_config(content, "config.json")
    for field in dataclasses.fields(ModelConfig):
        if field.name in ("attention_backend", "remat", "scan_layers", "head_dim", "rope_theta"):
            continue
        assert getattr(ours, field.name) == getattr(theirs, field.name, None), field.name
    assert ours.head_size == theirs.head_dim
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert hf_config.DEFAULTS[model_type][key] == getattr(theirs, key)


CONFIGS = [
    ModelConfig(sliding_window=16, tie_word_embeddings=True, rope_theta=1e6),
    ModelConfig(model_type="llama", head_dim=96, rms_norm_eps=1e-6),
    ModelConfig(model_type="mistral", num_key_value_heads=32, rope_theta=12_345.5),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_transformers_reads_what_is_written(config, tmp_path):
    content = hf_config.export_config(config, dtype="float32", **SPECIAL)
    (tmp_path / "config.json").write_text(json.dumps(content))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert hf_config.read_config(tmp_path)[0] == config
    assert hf_config.model_config(theirs.to_dict(), "config.json") == config
    assert theirs.rope_parameters == {"rope_theta": config.rope_theta, "rope_type": "default"}
    assert str(theirs.dtype) == "torch.float32"
    assert getattr(theirs, "sliding_window", None) == config.sliding_window


def test_a_windowed_llama_is_exported_as_mistral():
    config = ModelConfig(model_type="llama", sliding_window=128)
    content = hf_config.export_config(config, dtype="float32", **SPECIAL)
    assert content["architectures"] == ["MistralForCausalLM"]
    assert (content["model_type"], content["sliding_window"]) == ("mistral", 128)


@pytest.mark.parametrize(
    ("stated", "theta"),
    [
        ({}, 10_000.0),
        ({"rope_theta": 5e5}, 5e5),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, 5e5),
        ({"rope_theta": 5e5, "rope_scaling": None}, 5e5),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_theta": 5e5}}, 5e5),
    ],
)
def test_rope_theta(stated, theta):
    config = hf_config.model_config({"model_type": "llama", **stated}, "config.json")
    assert config.rope_theta == theta


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}, "architectures=.*Qwen2"),
        ({"architectures": None, "model_type": "mixtral"}, 'model_type="mixtral"'),
        ({"architectures": None, "model_type": None}, "neither model_type nor architectures"),
        ({"architectures": ["LlamaForCausalLM"]}, "contradict"),
        ({"attention_bias": True}, "attention_bias=true is not supported"),
        ({"mlp_bias": True}, "mlp_bias=true"),
        ({"hidden_act": "gelu"}, 'hidden_act="gelu".*expected silu'),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"pretraining_tp": 2}, "pretraining_tp=2"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 'rope_scaling.rope_type="linear"'),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_parameters.rope_type"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "one set of RoPE"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}, "contradict"),
        ({"rope_theta": "big"}, "rope_theta is 'big'"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor=0.25"),
        ({"num_local_experts": 8}, "num_local_experts=8"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
        ({"auto_map": {"AutoModelForCausalLM": "x.Model"}}, "auto_map"),
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
        ({"num_key_value_heads": 5}, "num_key_value_heads: 5 is not possible"),
        ({"head_dim": 5}, "head_dim: 5"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ],
)
def test_what_is_not_ours_is_refused_by_name(changes, message):
    content = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]} | changes
    with pytest.raises(UserError, match=message) as error:
        hf_config.model_config(content, "folder/config.json")
    assert str(error.value).startswith("folder/config.json: ")
    assert "\n" not in str(error.value)


def test_a_llama_with_a_window_is_refused():
    with pytest.raises(UserError, match="sliding_window=4096 with model_type 'llama'"):
        hf_config.model_config({"model_type": "llama", "sliding_window": 4096}, "config.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "no config.json"), ("{", "damaged JSON"), ("[]", "holds list")],
)
def test_unreadable_config(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        hf_config.read_config(tmp_path)
