"""H2O-Danube3-500M: 4T tokens in three stages.

Source: H2O-Danube3 Technical Report (arXiv 2407.09276), Table 1 and section 3. The mix of its
stages is published for the 4B model, and used here; what is chosen there is chosen here too.
"""

from danube_jax.config import base_config, phase, source, whole_steps

BILLION = 10**9
BATCH_TOKENS = 144 * 8_192

SHARES = (
    {"web": 0.906, "instruct": 0.015, "curated": 0.079},
    {"web": 0.817, "instruct": 0.056, "curated": 0.127},
    {"web": 0.516, "instruct": 0.366, "curated": 0.118},
)
STAGE_BILLIONS = (2_800, 1_150, 50)


def get_config():
    """The run as an ml_collections.ConfigDict."""
    config = base_config()
    config.name = "danube3_500m"

    model = config.model
    model.model_type = "llama"
    model.vocab_size = 32_000
    model.hidden_size = 1_536
    model.intermediate_size = 4_096
    model.num_hidden_layers = 16
    model.num_attention_heads = 16
    model.num_key_value_heads = 8
    model.head_dim = 96
    model.max_position_embeddings = 8_192
    model.rope_theta = 100_000.0
    model.initializer_range = 0.02

    config.data.tokenizer.builtin = "mistral"
    config.data.sources = {
        name: source(path=f"data/danube3/{name}/train", heldout_path=f"data/danube3/{name}/heldout")
        for name in ("web", "instruct", "curated")
    }

    config.training.batch_tokens = BATCH_TOKENS
    config.training.microbatch_tokens = 16_384
    config.phases = tuple(
        phase(
            name=f"stage{number}",
            tokens=whole_steps(billions * BILLION, BATCH_TOKENS),
            context_length=8_192,
            mixture=mixture,
        )
        for number, (billions, mixture) in enumerate(zip(STAGE_BILLIONS, SHARES, strict=True), 1)
    )

    optimizer = config.optimizer
    optimizer.learning_rate = 2e-4
    optimizer.final_learning_rate = 1e-5
    optimizer.warmup_tokens = 2_000 * BATCH_TOKENS

    config.evaluation.every_steps = 1_000
    config.checkpoint.every_steps = 1_000
    config.checkpoint.keep_every_steps = 50_000
    config.samples.prompts = ("The most important thing about", "Water boils when")
    return config
