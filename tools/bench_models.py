"""Small models that the benchmarks share."""

from danube_jax.config import ModelConfig

SMALL_MODELS = {
    "tiny": ModelConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8_192,
    ),
    "16m": ModelConfig(
        vocab_size=8_192,
        hidden_size=320,
        intermediate_size=864,
        num_hidden_layers=9,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=8_192,
    ),
}
