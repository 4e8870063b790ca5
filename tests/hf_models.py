"""Random models of transformers, and greedy text from them, as a reference."""

import dataclasses

import numpy as np
import pytest

from danube_jax.interop.hf_weights import params_from_hf

NOT_THEIRS = (
    "model_type",
    "attention_backend",
    "remat",
    "scan_layers",
    "sliding_window",
    "head_dim",
)


def random_model(config):
    """A float32 model of transformers for a `ModelConfig`, and the same weights as our tree."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    fields = {k: v for k, v in dataclasses.asdict(config).items() if k not in NOT_THEIRS}
    fields |= {"head_dim": config.head_size, "attn_implementation": "eager"}
    fields |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    torch.manual_seed(0)
    if config.model_type == "mistral":
        hf_config = transformers.MistralConfig(**fields, sliding_window=config.sliding_window)
        model = transformers.MistralForCausalLM(hf_config)
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields))
    state = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    return model.eval(), params_from_hf(state, config)


def greedy(model, prompt, new_tokens, **options):
    """The greedy continuation of one prompt by transformers' `generate`."""
    import torch

    tokens = torch.from_numpy(np.asarray(prompt)[None])
    with torch.inference_mode():
        output = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=new_tokens,
            do_sample=False,
            **options,
        )
    return output[0, len(prompt) :].tolist()
