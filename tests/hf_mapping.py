"""Parameters between Hugging Face's Llama and Mistral names and ours, for tests."""

import numpy as np


def params_from_hf(state, config):
    """Our parameter tree from a mapping of Hugging Face names to arrays [out, in]."""

    def matrix(*names):
        return np.concatenate([np.asarray(state[f"{name}.weight"]).T for name in names], axis=1)

    def scale(name):
        return {"scale": np.asarray(state[f"{name}.weight"])}

    params = {
        "embed_tokens": {"embedding": np.asarray(state["model.embed_tokens.weight"])},
        "norm": scale("model.norm"),
    }
    if not config.tie_word_embeddings:
        params["lm_head"] = {"kernel": matrix("lm_head")}
    for i in range(config.num_hidden_layers):
        prefix = f"model.layers.{i}."
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        projections = [attention + f"{name}_proj" for name in "qkv"]
        params[f"layers_{i}"] = {
            "input_layernorm": scale(prefix + "input_layernorm"),
            "post_attention_layernorm": scale(prefix + "post_attention_layernorm"),
            "self_attn": {
                "qkv_proj": {"kernel": matrix(*projections)},
                "o_proj": {"kernel": matrix(attention + "o_proj")},
            },
            "mlp": {
                "gate_up_proj": {"kernel": matrix(mlp + "gate_proj", mlp + "up_proj")},
                "down_proj": {"kernel": matrix(mlp + "down_proj")},
            },
        }
    return params
