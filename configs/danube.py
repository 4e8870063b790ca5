"""H2O-Danube-1.8B: 1T tokens in four phases that lengthen the context, window 4,096 throughout.

Source: H2O-Danube-1.8B Technical Report (arXiv 2401.16818), sections 3 and 4. The report names
neither data sets nor mix: point `data.sources` at your own TokenStores, and the tokenizer at a
copy of Llama 2's `tokenizer.model`.
"""

from danube_jax.config import base_config, phase, source

BATCH_TOKENS = 576 * 2_048  # the report's ~1.18M tokens
PHASES = ((593_398, 2_048), (84_771, 4_096), (84_771, 8_192), (84_771, 16_384))  # 700B, 3 x 100B


def get_config():
    """The run as an ml_collections.ConfigDict."""
    config = base_config()
    config.name = "danube"

    model = config.model
    model.model_type = "mistral"
    model.vocab_size = 32_000
    model.hidden_size = 2_560
    model.intermediate_size = 6_912
    model.num_hidden_layers = 24
    model.num_attention_heads = 32
    model.num_key_value_heads = 8
    model.max_position_embeddings = 16_384
    model.sliding_window = 4_096
    model.rope_theta = 10_000.0

    config.data.tokenizer.path = "data/danube/tokenizer.model"
    config.data.sources = {
        "web": source(path="data/danube/web/train", heldout_path="data/danube/web/heldout"),
    }

    config.precision.linear = "fp8"  # of the blocks; the head stays in bfloat16

    mixture = {"web": 1.0}
    config.training.batch_tokens = BATCH_TOKENS
    config.training.microbatch_tokens = 16_384
    config.phases = tuple(
        phase(
            name=f"{context // 1024}k",
            tokens=steps * BATCH_TOKENS,
            context_length=context,
            mixture=mixture,
        )
        for steps, context in PHASES
    )

    optimizer = config.optimizer
    optimizer.learning_rate = 2e-4
    optimizer.final_learning_rate = 1e-5
    optimizer.warmup_tokens = 2_000 * BATCH_TOKENS  # ~2.36B
    optimizer.b1, optimizer.b2 = 0.9, 0.95
    optimizer.weight_decay = 0.1
    optimizer.clip_norm = 1.0

    config.evaluation.every_steps = 1_000
    config.checkpoint.every_steps = 1_000
    config.checkpoint.keep_every_steps = 50_000
    config.samples.prompts = ("The most important thing about", "Water boils when")
    return config
