"""The linear projections of a layer by Hugging Face's names, and how the decoder fuses them."""

from danube_jax.config import ModelConfig

FUSED: dict[tuple[str, str], tuple[str, ...]] = {
    ("self_attn", "qkv_proj"): ("q_proj", "k_proj", "v_proj"),
    ("self_attn", "o_proj"): ("o_proj",),
    ("mlp", "gate_up_proj"): ("gate_proj", "up_proj"),
    ("mlp", "down_proj"): ("down_proj",),
}
"""The decoder's linear modules, and the projections side by side in their kernels [in, out]."""

PROJECTIONS: dict[str, str] = {name: block for (block, _), names in FUSED.items() for name in names}
"""Every projection, and the block ('self_attn' or 'mlp') that it belongs to."""


def projection_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(in, out) of every projection of a layer."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    width = config.num_attention_heads * config.head_size
    kv_width = config.num_key_value_heads * config.head_size
    return {
        "q_proj": (hidden, width),
        "k_proj": (hidden, kv_width),
        "v_proj": (hidden, kv_width),
        "o_proj": (width, hidden),
        "gate_proj": (hidden, ffn),
        "up_proj": (hidden, ffn),
        "down_proj": (ffn, hidden),
    }


def fused_parts(config: ModelConfig, block: str, module: str) -> tuple[tuple[str, int], ...]:
    """The projections side by side in a linear module, and the size of each."""
    shapes = projection_shapes(config)
    return tuple((name, shapes[name][1]) for name in FUSED[block, module])
