"""A small Danube on real English text that every Python machine has; no download, no data file.

Three sources of different quality, three phases that lengthen the context and shift the mix from
the many docstrings to the few good pages, as Danube and Danube2 do at scale. It trains its own
SentencePiece tokenizer and takes a few minutes on two CPU cores.
"""

from danube_jax.config import base_config, phase, source, whole_steps

BATCH_TOKENS = 2_048


def get_config():
    """The run as an ml_collections.ConfigDict."""
    config = base_config()
    config.name = "demo"

    model = config.model
    model.vocab_size = 2_048
    model.hidden_size = 128
    model.intermediate_size = 384
    model.num_hidden_layers = 4
    model.num_attention_heads = 4
    model.num_key_value_heads = 2
    model.max_position_embeddings = 512
    model.tie_word_embeddings = True

    config.precision.linear = "float32"
    config.precision.compute = "float32"

    config.data.tokenizer.train_vocab_size = 2_048
    config.data.sources = {
        "docstrings": source(builtin="docstrings"),
        "packages": source(builtin="package_descriptions", max_epochs=8.0),
        "reference": source(builtin="language_reference", max_epochs=8.0),
    }

    config.training.batch_tokens = BATCH_TOKENS
    config.phases = (
        phase(
            name="short",
            tokens=whole_steps(700_000, BATCH_TOKENS),
            context_length=128,
            mixture={"docstrings": 0.80, "packages": 0.15, "reference": 0.05},
        ),
        phase(
            name="medium",
            tokens=whole_steps(350_000, BATCH_TOKENS),
            context_length=256,
            mixture={"docstrings": 0.60, "packages": 0.20, "reference": 0.20},
        ),
        phase(
            name="long",
            tokens=whole_steps(150_000, BATCH_TOKENS),
            context_length=512,
            mixture={"docstrings": 0.40, "packages": 0.15, "reference": 0.45},
        ),
    )

    optimizer = config.optimizer
    optimizer.learning_rate = 6e-3
    optimizer.final_learning_rate = 3e-4
    optimizer.warmup_tokens = 40 * BATCH_TOKENS

    config.training.log_every = 10
    config.evaluation.every_steps = 200
    config.evaluation.tokens_per_source = 20_000
    config.checkpoint.every_steps = 100
    config.samples.prompts = ("The function returns", "If the value is", "This class is")
    config.samples.temperature = 0.6
    config.samples.top_k = 20
    return config
